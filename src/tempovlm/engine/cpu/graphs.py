"""The stages of a model as OpenVINO graphs, which compute what the modules of `tempovlm.model` compute.

All experts run, in two wide products, and those that a token does not visit get the weight 0: sixteen experts of a
few dozen values each are too small to gather. Top-k is an input, so that one graph serves every top-k.

Shapes: `B` batch, `C` crops, `P` patches of a crop, `G` tokens of a crop, `T` tokens, `D` width, `H` heads, `W`
head width, `E` experts, `F` expert width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from openvino import Model
from openvino import opset15 as op
from torch import Tensor, nn

from tempovlm.model.decoder import Block, Decoder
from tempovlm.model.layers import RMSNorm
from tempovlm.model.vision.encoder import Projector, VisionBlock, VisionTransformer

Node = Any
"""An output of a node of a graph."""

SIGMOID_SLOPE = np.float32(1.702)
"""Of CLIP's activation (Radford et al. 2021)."""

LAST = np.int64(-1)
_END = np.int64(2**31 - 1)


def _array(weight: Tensor) -> np.ndarray:
    return np.ascontiguousarray(weight.detach().numpy())


def _constant(value: Any) -> Node:
    return op.constant(np.asarray(value))


def _input(shape: Sequence[int], name: str, kind: Any = np.float32) -> Node:
    node = op.parameter(list(shape), kind)
    node.output(0).tensor.set_names({name})
    return node


def _product(x: Node, weight: np.ndarray) -> Node:
    """Return (..., in) times the transpose of (out, in)."""
    return op.matmul(x, _constant(weight), False, True)


def _linear(x: Node, layer: nn.Linear) -> Node:
    y = _product(x, _array(layer.weight))
    return y if layer.bias is None else op.add(y, _constant(_array(layer.bias)))


def _layer_norm(x: Node, norm: nn.LayerNorm) -> Node:
    y = op.mvn(x, _constant([LAST]), True, norm.eps, "inside_sqrt")
    return op.add(op.multiply(y, _constant(_array(norm.weight))), _constant(_array(norm.bias)))


def _rms_norm(x: Node, norm: RMSNorm) -> Node:
    square = op.reduce_mean(op.multiply(x, x), _constant([LAST]), keep_dims=True)
    scaled = op.divide(x, op.sqrt(op.add(square, _constant(np.float32(norm.eps)))))
    return op.multiply(scaled, _constant(_array(norm.weight)))


def _heads(x: Node, count: int, width: int) -> Node:
    """Split (B, T, D) into (B, H, T, W)."""
    return op.transpose(op.reshape(x, _constant([0, -1, count, width]), True), _constant([0, 2, 1, 3]))


def _merged(x: Node, width: int) -> Node:
    """Merge (B, H, T, W) into (B, T, D)."""
    return op.reshape(op.transpose(x, _constant([0, 2, 1, 3])), _constant([0, 0, width]), True)


def _parts(x: Node, count: int) -> list[Node]:
    return op.split(x, _constant(LAST), count).outputs()


def _rotated(x: Node, cos: Node, sin: Node) -> Node:
    first, second = _parts(x, 2)
    return op.add(op.multiply(x, cos), op.multiply(op.concat([op.negative(second), first], -1), sin))


def _attended(block: Block, x: Node, cos: Node, sin: Node) -> tuple[Node, Node, Node]:
    """Return (B, T, D) after attention, and the keys and values (B, H, T, W) of its tokens."""
    attention = block.attention
    width, count = attention.out.out_features, attention.num_heads
    query, key, value = _parts(_product(_rms_norm(x, attention.norm), _array(attention.qkv.weight)), 3)
    query = _rotated(_heads(_rms_norm(query, attention.q_norm), count, width // count), cos, sin)
    key = _rotated(_heads(_rms_norm(key, attention.k_norm), count, width // count), cos, sin)
    value = _heads(value, count, width // count)
    mixed = _merged(op.scaled_dot_product_attention(query, key, value, causal=True), width)
    return op.add(x, _product(mixed, _array(attention.out.weight))), key, value


def _visited(block: Block, x: Node, top_k: Node) -> Node:
    """Return (B, T, D) after the experts; of equal scores the lower index wins, as in `moe.best`."""
    moe = block.moe
    E, F2, D = moe.gate_up.shape
    normed = _rms_norm(x, moe.norm)
    scores = _product(normed, _array(moe.router.weight))
    places = op.topk(scores, top_k, -1, "max", "value", stable=True).output(1)
    shares = op.softmax(scores, -1)
    none = op.multiply(shares, _constant(np.float32(0)))
    weights = op.scatter_elements_update(none, places, op.gather_elements(shares, places, -1), _constant(LAST))
    gate, up = (_array(part.reshape(-1, D)) for part in moe.gate_up.chunk(2, dim=1))
    hidden = op.multiply(op.swish(_product(normed, gate)), _product(normed, up))
    by_expert = op.reshape(hidden, _constant([0, 0, E, F2 // 2]), True)
    weighted = op.multiply(by_expert, op.unsqueeze(weights, _constant([LAST])))
    down = _array(moe.down.permute(1, 0, 2).reshape(D, -1))
    return op.add(x, _product(op.reshape(weighted, _constant([0, 0, -1]), True), down))


def block_graph(block: Block) -> Model:
    """Build one block's reading of prompts, padded on the right.

    Returns:
        Inputs: states (B, T, D), cosines and sines (1, 1, T, W), and top-k (). Outputs: states (B, T, D), keys and
        values (B, H, T, W).
    """
    D = block.attention.out.out_features
    W = D // block.attention.num_heads
    x, top_k = _input((-1, -1, D), "x"), _input((), "top_k", np.int64)
    cos, sin = _input((1, 1, -1, W), "cos"), _input((1, 1, -1, W), "sin")
    y, key, value = _attended(block, x, cos, sin)
    outputs = (_visited(block, y, top_k), key, value)
    return Model([op.result(one) for one in outputs], [x, cos, sin, top_k], "block")


def head_graph(decoder: Decoder) -> Model:
    """Build the final norm and head: states (B, D) to logits (B, V)."""
    x = _input((-1, decoder.embedding.shape[1]), "x")
    return Model([op.result(_linear(_rms_norm(x, decoder.norm), decoder.head))], [x], "head")


def vision_graph(vision: VisionTransformer) -> Model:
    """Build the vision transformer: (C, P, patch values) to the kept layers' features (C, P, feature width)."""
    width = vision.patch_embedding.out_features
    num_patches = vision.positions.shape[0] - 1
    patches = _input((-1, num_patches, vision.patch_embedding.in_features), "patches")
    x = _linear(patches, vision.patch_embedding)
    count = op.gather(op.shape_of(patches), _constant([0]), _constant(0))
    shape = op.concat([count, _constant([1, width])], 0)
    x = op.concat([op.broadcast(_constant(_array(vision.class_embedding)), shape), x], 1)
    x = _layer_norm(op.add(x, _constant(_array(vision.positions))), vision.pre_norm)
    kept = {}
    for i in range(max(vision.keep) + 1):
        block = vision.blocks[i]
        assert isinstance(block, VisionBlock)
        heads = (block.num_heads, width // block.num_heads)
        query, key, value = (
            _heads(part, *heads) for part in _parts(_linear(_layer_norm(x, block.attention_norm), block.qkv), 3)
        )
        mixed = _merged(op.scaled_dot_product_attention(query, key, value), width)
        x = op.add(x, _linear(mixed, block.out))
        hidden = op.swish(_linear(_layer_norm(x, block.mlp_norm), block.up), _constant(SIGMOID_SLOPE))
        x = op.add(x, _linear(hidden, block.down))
        kept[i] = x
    without_class = [
        op.slice(kept[i], _constant([1]), _constant([_END]), _constant([1]), _constant([1])) for i in vision.keep
    ]
    return Model([op.result(op.concat(without_class, -1))], [patches], "vision")


def projector_graph(projector: Projector) -> Model:
    """Build pooling and projection: features (C, P, F) and shares of real pixels (C, P) to tokens (C, G, D)."""
    s, p, H = projector.side, projector.pool, projector.num_heads
    features_width, width = projector.query.in_features, projector.query.out_features
    features, masks = _input((-1, (s * p) ** 2, features_width), "features"), _input((-1, (s * p) ** 2), "masks")
    zero, one = _constant(np.float32(0)), _constant(np.float32(1))
    share = op.unsqueeze(masks, _constant([LAST]))
    empty = op.convert(op.equal(share, zero), np.float32)
    partial = op.convert(op.logical_and(op.less(share, one), op.not_equal(share, zero)), np.float32)
    padding = [
        op.multiply(_constant(_array(row)), part)
        for row, part in zip(projector.pad_embedding, (empty, partial), strict=True)
    ]
    x = op.add(features, op.add(*padding))
    split = op.reshape(x, _constant([-1, s, p, s, p, features_width]), False)
    windows = op.reshape(
        op.transpose(split, _constant([0, 1, 3, 2, 4, 5])), _constant([-1, p * p, features_width]), False
    )
    query = op.reshape(
        _linear(op.reduce_mean(windows, _constant([1]), keep_dims=True), projector.query),
        _constant([0, 1, H, -1]),
        True,
    )
    key, value = (
        op.reshape(part, _constant([0, p * p, H, width // H]), True)
        for part in _parts(_linear(windows, projector.key_value), 2)
    )
    scale = _constant(np.float32((width // H) ** -0.5))
    scores = op.multiply(op.reduce_sum(op.multiply(query, key), _constant([LAST]), keep_dims=True), scale)
    mixed = op.reduce_sum(op.multiply(op.softmax(scores, 1), value), _constant([1]), keep_dims=False)
    pooled = op.reshape(
        _linear(op.reshape(mixed, _constant([-1, width]), False), projector.out),
        _constant([-1, s * s, width]),
        False,
    )
    gate, up = _parts(_linear(pooled, projector.gate_up), 2)
    return Model(
        [op.result(_linear(op.multiply(op.swish(gate), up), projector.down))], [features, masks], "projector"
    )
