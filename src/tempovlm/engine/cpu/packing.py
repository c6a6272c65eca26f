"""A model's weights in the order in which the kernels read them, and the structures that `kernels.c` declares."""

from __future__ import annotations

import ctypes
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempovlm.model.decoder import Block, Decoder
from tempovlm.model.moe import MoE
from tempovlm.model.vision.encoder import Projector, VisionBlock, VisionTransformer

LANES = 16
"""Widths are multiples of it."""

MOST_EXPERTS = 256
"""Of a block."""

MOST_POOLED = 64
"""Patches of a window that becomes one token."""


class _Struct(ctypes.Structure):
    """A structure that keeps alive what its pointers point to: tensors, and lists of structures as arrays."""

    def __init__(self, **values: Any) -> None:
        self._kept: list[Any] = list(values.values())
        super().__init__(**{name: self._field(value) for name, value in values.items()})

    def _field(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            value = value.detach().contiguous()
            self._kept.append(value)
            return value.data_ptr()
        if isinstance(value, list):
            array = (type(value[0]) * len(value))(*value)
            self._kept.append(array)
            return ctypes.addressof(array)
        return value


_Pointer = ctypes.c_void_p


class _Matrix(_Struct):
    _fields_ = [("data", _Pointer), ("bias", _Pointer), ("rows", ctypes.c_int32), ("depth", ctypes.c_int32)]


class _VisionBlock(_Struct):
    _fields_ = [
        *((name, _Matrix) for name in ("qkv", "out", "up", "down")),
        *((name, _Pointer) for name in ("norm", "norm_bias", "mlp_norm", "mlp_norm_bias")),
    ]


class _Vision(_Struct):
    _fields_ = [
        ("patches", _Matrix),
        *((name, _Pointer) for name in ("positions", "norm", "norm_bias", "blocks", "keep")),
        *(
            (name, ctypes.c_int32)
            for name in ("num_blocks", "num_kept", "width", "heads", "tokens", "patch_values")
        ),
        ("eps", ctypes.c_float),
    ]


class _Projector(_Struct):
    _fields_ = [
        *((name, _Matrix) for name in ("query", "key_value", "out", "gate_up", "down")),
        ("padding", _Pointer),
        *((name, ctypes.c_int32) for name in ("side", "pool", "heads", "features", "width", "out_width")),
    ]


class _Block(_Struct):
    _fields_ = [
        *((name, _Matrix) for name in ("qkv", "out", "gate_up", "down")),
        *((name, _Pointer) for name in ("norm", "q_norm", "k_norm", "moe_norm", "router")),
    ]


class _Decoder(_Struct):
    _fields_ = [
        ("blocks", _Pointer),
        ("head", _Matrix),
        *((name, _Pointer) for name in ("norm", "cos", "sin")),
        *((name, ctypes.c_int32) for name in ("width", "heads", "experts")),
        ("eps", ctypes.c_float),
    ]


def _up_to(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


class Packer:
    """Packs weights into panels of `columns` outputs, with `pair` factors of a depth side by side."""

    def __init__(self, columns: int, pair: int) -> None:
        self._columns, self._pair = columns, pair
        self._dtype = torch.bfloat16 if pair > 1 else torch.float32

    def panels(self, weight: Tensor) -> Tensor:
        """Return (..., rows, depth) as (..., panels, depth / pair, columns, pair), missing rows and depth zero."""
        rows, depth = weight.shape[-2:]
        padded = F.pad(weight.detach(), (0, -depth % self._pair, 0, -rows % self._columns))
        split = padded.unflatten(-1, (-1, self._pair)).unflatten(-3, (-1, self._columns))
        return split.transpose(-3, -2).to(self._dtype).contiguous()

    def matrix(self, weight: Tensor, bias: Tensor | None = None) -> _Matrix:
        """Pack (rows, depth) with a bias (rows,); rows are filled up to a multiple of the lanes."""
        rows, depth = weight.shape[-2:]
        filled = None if bias is None else F.pad(bias.detach(), (0, -rows % LANES))
        return _Matrix(
            data=self.panels(weight), bias=filled, rows=_up_to(rows, LANES), depth=_up_to(depth, self._pair)
        )

    def gated(self, gate: Tensor, up: Tensor) -> _Matrix:
        """Pack the rows (..., F, depth) of gates and values so that a panel has half a panel of each."""
        half = self._columns // 2
        both = [F.pad(part.detach(), (0, 0, 0, -part.shape[-2] % LANES)) for part in (gate, up)]
        mixed = torch.stack([part.unflatten(-2, (-1, half)) for part in both], dim=-3).flatten(-4, -2)
        return self.matrix(mixed)

    def linear(self, layer: nn.Linear) -> _Matrix:
        """Pack a layer."""
        return self.matrix(layer.weight, layer.bias)

    def experts(self, moe: MoE) -> tuple[_Matrix, _Matrix]:
        """Pack all experts: gates and values, and the products after them."""
        gate, up = moe.gate_up.chunk(2, dim=1)
        down = F.pad(moe.down.detach(), (0, -moe.down.shape[-1] % LANES))
        return self.gated(gate, up), self.matrix(down)


def pack_vision(vision: VisionTransformer, packer: Packer) -> _Vision:
    """Pack the blocks that run."""
    blocks = [cast(VisionBlock, block) for block in vision.blocks][: max(vision.keep) + 1]
    positions = vision.positions.detach().clone()
    positions[0] += vision.class_embedding.detach()
    keep = torch.full((len(blocks),), -1, dtype=torch.int32)
    keep[list(vision.keep)] = torch.arange(len(vision.keep), dtype=torch.int32)
    return _Vision(
        patches=packer.linear(vision.patch_embedding),
        positions=positions,
        norm=vision.pre_norm.weight,
        norm_bias=vision.pre_norm.bias,
        blocks=[_pack_vision_block(block, packer) for block in blocks],
        keep=keep,
        num_blocks=len(blocks),
        num_kept=len(vision.keep),
        width=vision.patch_embedding.out_features,
        heads=blocks[0].num_heads,
        tokens=len(vision.positions),
        patch_values=vision.patch_embedding.in_features,
        eps=vision.pre_norm.eps,
    )


def _pack_vision_block(block: VisionBlock, packer: Packer) -> _VisionBlock:
    return _VisionBlock(
        qkv=packer.linear(block.qkv),
        out=packer.linear(block.out),
        up=packer.linear(block.up),
        down=packer.linear(block.down),
        norm=block.attention_norm.weight,
        norm_bias=block.attention_norm.bias,
        mlp_norm=block.mlp_norm.weight,
        mlp_norm_bias=block.mlp_norm.bias,
    )


def pack_projector(projector: Projector, packer: Packer) -> _Projector:
    """Pack pooling and projection."""
    gate, up = projector.gate_up.weight.chunk(2)
    return _Projector(
        query=packer.linear(projector.query),
        key_value=packer.linear(projector.key_value),
        out=packer.linear(projector.out),
        gate_up=packer.gated(gate, up),
        down=packer.linear(projector.down),
        padding=projector.pad_embedding,
        side=projector.side,
        pool=projector.pool,
        heads=projector.num_heads,
        features=projector.query.in_features,
        width=projector.query.out_features,
        out_width=projector.down.out_features,
    )


def pack_decoder(decoder: Decoder, packer: Packer) -> _Decoder:
    """Pack all blocks, in the model's order."""
    blocks = [cast(Block, block) for block in decoder.blocks]
    return _Decoder(
        blocks=[_pack_block(block, packer) for block in blocks],
        head=packer.linear(decoder.head),
        norm=decoder.norm.weight,
        cos=decoder.rotary.cos,
        sin=decoder.rotary.sin,
        width=decoder.embedding.shape[1],
        heads=blocks[0].attention.num_heads,
        experts=blocks[0].moe.router.out_features,
        eps=decoder.norm.eps,
    )


def _pack_block(block: Block, packer: Packer) -> _Block:
    attention, moe = block.attention, block.moe
    gate_up, down = packer.experts(moe)
    router = moe.router.weight.detach()
    return _Block(
        qkv=packer.linear(attention.qkv),
        out=packer.linear(attention.out),
        gate_up=gate_up,
        down=down,
        norm=attention.norm.weight,
        q_norm=attention.q_norm.weight,
        k_norm=attention.k_norm.weight,
        moe_norm=moe.norm.weight,
        router=F.pad(router.t(), (0, -len(router) % LANES)),
    )
