"""A peer on a CPU: the stages of a model as OpenVINO graphs in their fastest bare form.

One graph of fixed shapes reads a prompt by a whole plan, another makes one token after a context of fixed length;
no deadline is looked at inside. All experts run, in two wide products, and those that a token does not visit get
the weight 0.

Shapes: `C` crops, `P` patches of a crop, `G` tokens of a crop, `T` tokens, `D` width, `H` heads, `W` head width,
`E` experts, `F` expert width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import openvino
import torch
from openvino import Model, Type
from openvino import opset15 as op
from torch import Tensor, nn

from peers_cpu_stages import SIGMOID_SLOPE, Stage
from tempovlm.core.plan import Plan
from tempovlm.model.decoder import Block
from tempovlm.model.layers import RMSNorm
from tempovlm.model.vision.encoder import VisionBlock
from tempovlm.model.vlm import Molmo

Node = Any
"""An output of a node of a graph."""

LAST = np.int64(-1)
_TYPES = {"f32": Type.f32, "bf16": Type.bf16}


class OpenVino:
    """The stages of one model, compiled for a number of threads and a type of products."""

    precisions = ("f32", "bf16")

    def __init__(self, model: Molmo, precision: str, threads: int) -> None:
        self._model, self._kind = model, _TYPES[precision]
        self._core = openvino.Core()
        self._options = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,
        }

    @classmethod
    def can_run(cls, precision: str) -> bool:
        """Whether the processor has instructions for a type of products."""
        capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return precision == "f32" or "BF16" in capabilities

    def encode(self, crops: int) -> Stage:
        """Compile the vision transformer: (C, P, patch values) to features (C, P, feature width)."""
        return self._compiled(_vision_graph(self._model, crops))

    def project(self, crops: int) -> Stage:
        """Compile the projector: features and shares of real pixels (C, P) to tokens (C, G, D)."""
        return self._compiled(_projector_graph(self._model, crops))

    def prefill(self, plan: Plan, length: int | None) -> Stage:
        """Compile the reading of a prompt: (1, T, D) to logits (1, V), keys and values (1, H, T, W) of each step.

        Without a length the graph takes prompts of any.
        """
        return self._compiled(_decoder_graph(self._model, plan, length, None, self._kind))

    def decode(self, plan: Plan, context: int) -> Stage:
        """Compile a token: (1, 1, D) and the context's keys and values to logits, and its own keys and values."""
        return self._compiled(_decoder_graph(self._model, plan, 1, context, self._kind))

    def _compiled(self, graph: Model) -> Stage:
        request = self._core.compile_model(graph, "CPU", self._options).create_infer_request()

        def run(*inputs: Any) -> list[Any]:
            for i, one in enumerate(inputs):
                request.set_input_tensor(i, _shared(one) if isinstance(one, Tensor) else one)
            request.infer()
            return list(request.output_tensors)

        return run

    @staticmethod
    def numbers(output: Any) -> Tensor:
        """Copy an output of a stage, as float32."""
        if output.element_type == Type.bf16:
            halves = torch.from_numpy(np.array(output.data).view(np.int16).reshape(tuple(output.shape)))
            return halves.view(torch.bfloat16).float()
        return torch.from_numpy(output.data.copy())


def _shared(values: Tensor) -> Any:
    return openvino.Tensor(values.contiguous().numpy(), shared_memory=True)


def _array(weight: Tensor) -> np.ndarray:
    return np.ascontiguousarray(weight.detach().numpy())


def _constant(value: Any) -> Node:
    return op.constant(np.asarray(value))


def _product(x: Node, weight: Tensor) -> Node:
    """Return (..., in) times the transpose of (out, in)."""
    return _times_transposed(x, _constant(_array(weight)))


def _times_transposed(x: Node, y: Node) -> Node:
    return op.matmul(x, y, False, True)


def _shaped(x: Node, *shape: int, keeps: bool = False) -> Node:
    """Reshape; with `keeps`, 0 keeps a size."""
    return op.reshape(x, _constant(shape), keeps)


def _sum(x: Node, axis: int = -1) -> Node:
    """Sum over a dimension, which stays with size 1."""
    return op.reduce_sum(x, _constant([axis]), keep_dims=True)


def _mean(x: Node, axis: int = -1) -> Node:
    """Return the mean over a dimension, which stays with size 1."""
    return op.reduce_mean(x, _constant([axis]), keep_dims=True)


def _linear(x: Node, layer: nn.Linear) -> Node:
    y = _product(x, layer.weight)
    return y if layer.bias is None else op.add(y, _constant(_array(layer.bias)))


def _layer_norm(x: Node, norm: nn.LayerNorm) -> Node:
    y = op.mvn(x, _constant([LAST]), True, norm.eps, "inside_sqrt")
    return op.add(op.multiply(y, _constant(_array(norm.weight))), _constant(_array(norm.bias)))


def _rms_norm(x: Node, norm: RMSNorm) -> Node:
    square = _mean(op.multiply(x, x))
    scaled = op.divide(x, op.sqrt(op.add(square, _constant(np.float32(norm.eps)))))
    return op.multiply(scaled, _constant(_array(norm.weight)))


def _heads(x: Node, count: int, width: int) -> Node:
    """Split (B, T, D) into (B, H, T, W)."""
    return op.transpose(_shaped(x, 0, -1, count, width, keeps=True), _constant([0, 2, 1, 3]))


def _merged(x: Node, width: int) -> Node:
    """Merge (B, H, T, W) into (B, T, D)."""
    return _shaped(op.transpose(x, _constant([0, 2, 1, 3])), 0, 0, width, keeps=True)


def _parts(x: Node, count: int) -> list[Node]:
    return op.split(x, _constant(LAST), count).outputs()


def _rotated(x: Node, cos: Node, sin: Node) -> Node:
    first, second = _parts(x, 2)
    return op.add(op.multiply(x, cos), op.multiply(op.concat([op.negative(second), first], -1), sin))


def _attended(block: Block, x: Node, tables: Sequence[Node], past: Sequence[Node]) -> tuple[Node, Node, Node]:
    """Return (1, T, D) after attention, and the keys and values (1, H, T, W) of its tokens."""
    attention = block.attention
    width, count = attention.out.out_features, attention.num_heads
    query, key, value = _parts(_product(_rms_norm(x, attention.norm), attention.qkv.weight), 3)
    query = _rotated(_heads(_rms_norm(query, attention.q_norm), count, width // count), *tables)
    key = _rotated(_heads(_rms_norm(key, attention.k_norm), count, width // count), *tables)
    value = _heads(value, count, width // count)
    if past:
        mixed = _looked_back(query, key, value, *past)
    else:
        mixed = op.scaled_dot_product_attention(query, key, value, causal=True)
    return op.add(x, _product(_merged(mixed, width), attention.out.weight)), key, value


def _looked_back(query: Node, key: Node, value: Node, keys: Node, values: Node) -> Node:
    """Attend from one token to a context and itself; joining the scores copies less than joining the keys."""
    _, _, context, width = keys.shape
    query = op.multiply(query, _constant(np.float32(width**-0.5)))
    own = _sum(op.multiply(query, key))
    shares = op.softmax(op.concat([_times_transposed(query, keys), own], -1), -1)
    before, at = op.variadic_split(shares, _constant(LAST), _constant([context, 1])).outputs()
    return op.add(op.matmul(before, values, False, False), op.multiply(at, value))


def _visited(block: Block, x: Node, top_k: int) -> Node:
    """Return (1, T, D) after the experts."""
    moe = block.moe
    E, F2, D = moe.gate_up.shape
    normed = _rms_norm(x, moe.norm)
    scores = _product(normed, moe.router.weight)
    places = op.topk(scores, _constant(np.int64(top_k)), -1, "max", "value").output(1)
    shares = op.softmax(scores, -1)
    none = op.multiply(shares, _constant(np.float32(0)))
    weights = op.scatter_elements_update(none, places, op.gather_elements(shares, places, -1), _constant(LAST))
    gate, up = (part.reshape(-1, D) for part in moe.gate_up.chunk(2, dim=1))
    hidden = op.multiply(op.swish(_product(normed, gate)), _product(normed, up))
    by_expert = _shaped(hidden, 0, 0, E, F2 // 2, keeps=True)
    weighted = op.multiply(by_expert, op.unsqueeze(weights, _constant([LAST])))
    down = moe.down.permute(1, 0, 2).reshape(D, -1)
    return op.add(x, _product(_shaped(weighted, 0, 0, -1, keeps=True), down))


def _decoder_graph(model: Molmo, plan: Plan, length: int | None, context: int | None, kind: Type) -> Model:
    """Build the plan's blocks and the head; the keys and values that enter and leave are of the products' type."""
    decoder = model.decoder
    D, H = model.config.width, model.config.num_heads
    x = op.parameter([1, -1 if length is None else length, D], Type.f32)
    start = context or 0
    tables = []
    for table in (decoder.rotary.cos, decoder.rotary.sin):
        rows = _constant(_array(table)[None, None])
        if length is None:
            end = op.gather(op.shape_of(x), _constant([1]), _constant(0))
            tables.append(op.slice(rows, _constant([0]), end, _constant([1]), _constant([2])))
        else:
            tables.append(_constant(_array(table[None, None, start : start + length])))
    parameters, outputs, y = [x], [], x
    for index, top_k in plan.steps:
        block = cast(Block, decoder.blocks[index])
        past = [op.parameter([1, H, context, D // H], kind) for _ in range(2)] if context else []
        parameters += past
        y, *entries = _attended(block, y, tables, [op.convert(one, Type.f32) for one in past])
        y = _visited(block, y, top_k)
        outputs += [op.convert(one, kind) for one in entries]
    last = op.gather(y, _constant(LAST), _constant(1))
    logits = _linear(_rms_norm(last, decoder.norm), decoder.head)
    return Model([op.result(one) for one in (logits, *outputs)], parameters, "decoder")


def _vision_graph(model: Molmo, crops: int) -> Model:
    vision = model.vision
    width, places = vision.patch_embedding.out_features, vision.positions.shape[0]
    patches = op.parameter([crops, places - 1, vision.patch_embedding.in_features], Type.f32)
    first = np.broadcast_to(_array(vision.class_embedding), (crops, 1, width)).copy()
    x = op.concat([_constant(first), _linear(patches, vision.patch_embedding)], 1)
    x = _layer_norm(op.add(x, _constant(_array(vision.positions))), vision.pre_norm)
    kept = {}
    for i in range(max(vision.keep) + 1):
        block = cast(VisionBlock, vision.blocks[i])
        heads = (block.num_heads, width // block.num_heads)
        qkv = _parts(_linear(_layer_norm(x, block.attention_norm), block.qkv), 3)
        mixed = op.scaled_dot_product_attention(*(_heads(part, *heads) for part in qkv))
        x = op.add(x, _linear(_merged(mixed, width), block.out))
        hidden = op.swish(_linear(_layer_norm(x, block.mlp_norm), block.up), _constant(np.float32(SIGMOID_SLOPE)))
        x = op.add(x, _linear(hidden, block.down))
        kept[i] = op.slice(x, _constant([1]), _constant([places]), _constant([1]), _constant([1]))
    return Model([op.result(op.concat([kept[i] for i in vision.keep], -1))], [patches], "vision")


def _projector_graph(model: Molmo, crops: int) -> Model:
    projector = model.projector
    s, p, H = projector.side, projector.pool, projector.num_heads
    wide, width, count = projector.query.in_features, projector.query.out_features, crops * projector.side**2
    features = op.parameter([crops, (s * p) ** 2, wide], Type.f32)
    masks = op.parameter([crops, (s * p) ** 2], Type.f32)
    zero, one = _constant(np.float32(0)), _constant(np.float32(1))
    share = op.unsqueeze(masks, _constant([LAST]))
    kinds = (op.equal(share, zero), op.logical_and(op.less(share, one), op.not_equal(share, zero)))
    x = features
    for row, where in zip(projector.pad_embedding, kinds, strict=True):
        x = op.add(x, op.multiply(_constant(_array(row)), op.convert(where, Type.f32)))
    split = op.transpose(_shaped(x, -1, s, p, s, p, wide), _constant([0, 1, 3, 2, 4, 5]))
    windows = _shaped(split, count, p * p, wide)
    query = _shaped(_linear(_mean(windows, axis=1), projector.query), count, 1, H, -1)
    key, value = (
        _shaped(part, count, p * p, H, width // H) for part in _parts(_linear(windows, projector.key_value), 2)
    )
    scores = _sum(op.multiply(query, key))
    scores = op.multiply(scores, _constant(np.float32((width // H) ** -0.5)))
    mixed = _sum(op.multiply(op.softmax(scores, 1), value), axis=1)
    pooled = _linear(_shaped(mixed, crops, s * s, width), projector.out)
    gate, up = _parts(_linear(pooled, projector.gate_up), 2)
    down = _linear(op.multiply(op.swish(gate), up), projector.down)
    return Model([op.result(down)], [features, masks], "projector")
