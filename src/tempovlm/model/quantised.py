"""Weights of a decode step in one byte a value, with a float32 scale for every output row.

A step at batch 1 takes as long as its weights take to read. Attention's products, experts and the head are nearly
all of them; norms and the embedding, of which a step reads next to nothing, stay as they are, and so does the
router: an error there changes which experts run. Rounding is to the nearest; a row's largest value is the largest
that the type holds. Vectors are not quantised. `kernels/decode.py` multiplies with these weights.

Shapes: `R` output rows and `C` columns of a matrix; experts come before them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tempovlm.model.attention import Attention
from tempovlm.model.decoder import Block, Decoder
from tempovlm.model.layers import RMSNorm, Rotary
from tempovlm.model.moe import MoE

Kind = Literal["fp8", "int8"]

TYPES: dict[str, tuple[torch.dtype, float]] = {"fp8": (torch.float8_e4m3fn, 448.0), "int8": (torch.int8, 127.0)}
"""The type of each kind, and the largest value that it holds."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """A matrix, or one for each expert: `values` (..., R, C) of one byte, times `scales` (..., R) in float32."""

    values: Tensor
    scales: Tensor

    @classmethod
    def of(cls, weight: Tensor, kind: Kind) -> Scaled:
        """Quantise (..., R, C), one expert at a time, so that little more memory than the result is needed."""
        dtype, largest = TYPES[kind]
        values = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        scales = torch.empty(weight.shape[:-1], dtype=torch.float32, device=weight.device)
        every = range(len(weight)) if weight.ndim > 2 else (...,)
        for part in every:
            exact = weight[part].detach().float()
            scale = exact.abs().amax(dim=-1) / largest
            scale = torch.where(scale > 0, scale, 1.0)
            ratios = exact / scale.unsqueeze(-1)
            # A quotient may pass the largest value by a rounding; a conversion to fp8 rounds by itself.
            ratios = ratios.clamp(-largest, largest)
            values[part] = (ratios.round() if kind == "int8" else ratios).to(dtype)
            scales[part] = scale
        return cls(values, scales)

    @property
    def shape(self) -> torch.Size:
        """(..., R, C)."""
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes

    def dense(self) -> Tensor:
        """Return the float32 matrix that this represents."""
        return self.values.float() * self.scales.unsqueeze(-1)


Weight = Tensor | Scaled


def parts(weight: Weight) -> tuple[Tensor, Tensor | None]:
    """Return values and scales; a plain tensor has no scales."""
    return (weight.values, weight.scales) if isinstance(weight, Scaled) else (weight, None)


@dataclass(frozen=True, slots=True)
class Product:
    """Stands for a linear layer."""

    weight: Scaled


@dataclass(frozen=True, slots=True)
class QuantisedAttention:
    """Stands for `Attention`."""

    norm: RMSNorm
    qkv: Product
    q_norm: RMSNorm
    k_norm: RMSNorm
    out: Product

    @classmethod
    def of(cls, layer: Attention, kind: Kind) -> QuantisedAttention:
        """Shares the norms."""
        qkv, out = (Product(Scaled.of(one.weight, kind)) for one in (layer.qkv, layer.out))
        return cls(layer.norm, qkv, layer.q_norm, layer.k_norm, out)


@dataclass(frozen=True, slots=True)
class QuantisedMoE:
    """Stands for `MoE`."""

    norm: RMSNorm
    router: nn.Linear
    gate_up: Scaled
    down: Scaled

    @classmethod
    def of(cls, layer: MoE, kind: Kind) -> QuantisedMoE:
        """Shares norm and router."""
        return cls(layer.norm, layer.router, Scaled.of(layer.gate_up, kind), Scaled.of(layer.down, kind))


@dataclass(frozen=True, slots=True)
class QuantisedBlock:
    """Stands for `Block`."""

    attention: QuantisedAttention
    moe: QuantisedMoE


@dataclass(frozen=True, slots=True)
class QuantisedDecoder:
    """The weights that a step reads instead of a `Decoder`; fields are named like the modules they replace."""

    embedding: Tensor
    blocks: tuple[QuantisedBlock, ...]
    norm: RMSNorm
    head: Product
    rotary: Rotary

    @classmethod
    def of(cls, decoder: Decoder, kind: Kind) -> QuantisedDecoder:
        """Return a copy of the decoder's matrices with one byte a value; the rest is shared with it."""
        blocks = tuple(
            QuantisedBlock(QuantisedAttention.of(block.attention, kind), QuantisedMoE.of(block.moe, kind))
            for block in decoder.blocks
            if isinstance(block, Block)
        )
        head = Product(Scaled.of(decoder.head.weight, kind))
        return cls(decoder.embedding, blocks, decoder.norm, head, decoder.rotary)

    @property
    def nbytes(self) -> int:
        """Bytes used in addition to the decoder."""
        total = self.head.weight.nbytes
        for block in self.blocks:
            attention, moe = block.attention, block.moe
            products = (attention.qkv.weight, attention.out.weight, moe.gate_up, moe.down)
            total += sum(one.nbytes for one in products)
        return total


AnyAttention = Attention | QuantisedAttention
AnyMoE = MoE | QuantisedMoE
AnyBlock = Block | QuantisedBlock
AnyDecoder = Decoder | QuantisedDecoder


@torch.no_grad()
def imitate(decoder: Decoder, kind: Kind) -> Decoder:
    """Return a copy with the values that the quantised weights represent, in the decoder's type: for measuring."""
    imitation = copy.deepcopy(decoder)
    products = [imitation.head.weight]
    for block in imitation.blocks:
        assert isinstance(block, Block)
        attention, moe = block.attention, block.moe
        products += [attention.qkv.weight, attention.out.weight, moe.gate_up, moe.down]
    for weight in products:
        weight.copy_(Scaled.of(weight, kind).dense())
    return imitation
