"""A peer on a CPU: the stages of a model as ONNX graphs, which ONNX Runtime runs in float32.

Attention, norms and gates are single operators, where the runtime has them; all experts run in two wide products,
and those that a token does not visit get the weight 0. Threads do not spin while they wait: otherwise they burn a
core for tens of milliseconds after a run. Shapes as in `peers_cpu_openvino`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from peers_cpu_stages import SIGMOID_SLOPE, Stage
from tempovlm.core.plan import Plan
from tempovlm.model.decoder import Block
from tempovlm.model.layers import RMSNorm
from tempovlm.model.vision.encoder import VisionBlock
from tempovlm.model.vlm import Molmo

OPSET = 21
CONTRIBUTED = "com.microsoft"
"""Domain of operators that only this runtime has."""


class OnnxRuntime:
    """The stages of one model in sessions with a number of threads."""

    precisions = ("f32",)

    def __init__(self, model: Molmo, precision: str, threads: int) -> None:
        assert precision in self.precisions
        self._model, self._threads = model, threads

    @classmethod
    def can_run(cls, precision: str) -> bool:
        """Whether a type of products is known."""
        return precision in cls.precisions

    def encode(self, crops: int) -> Stage:
        """Load the vision transformer: (C, P, patch values) to features (C, P, feature width)."""
        return self._loaded(_vision_graph(self._model, crops))

    def project(self, crops: int) -> Stage:
        """Load the projector: features and shares of real pixels (C, P) to tokens (C, G, D)."""
        return self._loaded(_projector_graph(self._model, crops))

    def prefill(self, plan: Plan, length: int | None) -> Stage:
        """Load the reading of a prompt: (1, T, D) to logits (1, V), and keys and values (1, H, T, W) of each step.

        Without a length the graph takes prompts of any.
        """
        return self._loaded(_decoder_graph(self._model, plan, length, None), is_fixed=length is not None)

    def decode(self, plan: Plan, context: int) -> Stage:
        """Load a token: (1, 1, D) and the context's keys and values to logits, and its own keys and values."""
        return self._loaded(_decoder_graph(self._model, plan, 1, context))

    def _loaded(self, graph: Graph, *, is_fixed: bool = True) -> Stage:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self._threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(graph.serialized(), options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        for name in graph.outputs:
            binding.bind_output(name)

        def run(*inputs: Any) -> list[Any]:
            if not is_fixed:  # outputs of one run are the buffers of the next one, of whatever length
                binding.clear_binding_outputs()
                for name in graph.outputs:
                    binding.bind_output(name)
            for name, one in zip(graph.inputs, inputs, strict=True):
                binding.bind_ortvalue_input(name, _shared(one) if isinstance(one, Tensor) else one)
            session.run_with_iobinding(binding)
            return binding.get_outputs()

        return run

    @staticmethod
    def numbers(output: Any) -> Tensor:
        """Copy an output of a stage, as float32."""
        return torch.from_numpy(output.numpy())


def _shared(values: Tensor) -> Any:
    return onnxruntime.OrtValue.ortvalue_from_numpy(values.contiguous().numpy())


class Graph:
    """A graph that is being written; values are their names."""

    def __init__(self) -> None:
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}
        self._nodes: list[Any] = []
        self._constants: list[Any] = []

    def input(self, name: str, shape: Sequence[int | str]) -> str:
        """Declare a float32 input; a text stands for any size."""
        self.inputs[name] = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        return name

    def output(self, name: str) -> None:
        """Declare a value as the next output."""
        self.outputs[name] = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)

    def constant(self, value: Any) -> str:
        """Return a constant: a weight of torch, an array or numbers."""
        array = value.detach().contiguous().numpy() if isinstance(value, Tensor) else np.asarray(value)
        name = f"c{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(array, name))
        return name

    def add(self, kind: str, *inputs: str, results: int = 0, domain: str = "", **options: Any) -> Any:
        """Add an operator; return its result, or a list of several."""
        names = [f"v{len(self._nodes)}_{i}" for i in range(results or 1)]
        self._nodes.append(helper.make_node(kind, list(inputs), names, domain=domain, **options))
        return names if results else names[0]

    def linear(self, x: str, layer: nn.Linear) -> str:
        """Apply a layer to the last dimension."""
        y = self.product(x, layer.weight)
        return y if layer.bias is None else self.add("Add", y, self.constant(layer.bias))

    def product(self, x: str, weight: Tensor) -> str:
        """Return (..., in) times the transpose of (out, in)."""
        return self.add("MatMul", x, self.constant(weight.t()))

    def layer_norm(self, x: str, norm: nn.LayerNorm) -> str:
        """Normalise the last dimension."""
        weights = (self.constant(norm.weight), self.constant(norm.bias))
        return self.add("LayerNormalization", x, *weights, epsilon=norm.eps)

    def rms_norm(self, x: str, norm: RMSNorm) -> str:
        """Normalise the last dimension by its root mean square."""
        return self.add("SimplifiedLayerNormalization", x, self.constant(norm.weight), epsilon=norm.eps)

    def shaped(self, x: str, *shape: int) -> str:
        """Reshape; 0 keeps a size."""
        return self.add("Reshape", x, self.constant(np.array(shape, dtype=np.int64)))

    def split(self, x: str, count: int) -> list[str]:
        """Split the last dimension into equal parts."""
        parts: list[str] = self.add("Split", x, results=count, axis=-1, num_outputs=count)
        return parts

    def sum(self, x: str, axis: int = -1) -> str:
        """Sum over a dimension, which stays with size 1."""
        return self.add("ReduceSum", x, self.constant(np.array([axis])), keepdims=1)

    def softmax(self, x: str, axis: int = -1) -> str:
        """Return shares along a dimension."""
        return self.add("Softmax", x, axis=axis)

    def joined(self, *parts: str, axis: int = -1) -> str:
        """Join along a dimension, by default the last."""
        return self.add("Concat", *parts, axis=axis)

    def attention(self, *qkv: str, heads: int, **options: Any) -> str:
        """Attend from (B, T, D) queries to keys and values."""
        return self.add("MultiHeadAttention", *qkv, domain=CONTRIBUTED, num_heads=heads, **options)

    def gate(self, x: str, slope: float = 1.0) -> str:
        """Return x times the sigmoid of `slope` times x."""
        return self.add("QuickGelu", x, domain=CONTRIBUTED, alpha=slope)

    def serialized(self) -> bytes:
        """Return the finished model."""
        graph = helper.make_graph(
            self._nodes, "stage", list(self.inputs.values()), list(self.outputs.values()), self._constants
        )
        sets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIBUTED, 1)]
        return helper.make_model(graph, opset_imports=sets, ir_version=10).SerializeToString()


def _rotated(graph: Graph, x: str, cos: str, sin: str) -> str:
    first, second = graph.split(x, 2)
    turned = graph.joined(graph.add("Neg", second), first)
    return graph.add("Add", graph.add("Mul", x, cos), graph.add("Mul", turned, sin))


def _attended(
    graph: Graph, block: Block, x: str, tables: Sequence[str], past: Sequence[str], context: int
) -> tuple[str, str, str]:
    """Return (1, T, D) after attention, and the keys and values (1, H, T, W) of its tokens."""
    attention = block.attention
    D, H = attention.out.out_features, attention.num_heads

    def heads(y: str) -> str:
        return graph.add("Transpose", graph.shaped(y, 0, 0, H, D // H), perm=[0, 2, 1, 3])

    qkv = graph.product(graph.rms_norm(x, attention.norm), attention.qkv.weight)
    query, key, value = graph.split(qkv, 3)
    query = _rotated(graph, heads(graph.rms_norm(query, attention.q_norm)), *tables)
    key = _rotated(graph, heads(graph.rms_norm(key, attention.k_norm)), *tables)
    value = heads(value)
    if past:
        scale = graph.constant(np.float32((D // H) ** -0.5))
        mixed = _looked_back(graph, graph.add("Mul", query, scale), key, value, *past, context)
        mixed = graph.shaped(graph.add("Transpose", mixed, perm=[0, 2, 1, 3]), 0, 0, D)
    else:
        rows = graph.shaped(graph.add("Transpose", query, perm=[0, 2, 1, 3]), 0, 0, D)
        mixed = graph.attention(rows, key, value, heads=H, unidirectional=1)
    return graph.add("Add", x, graph.product(mixed, attention.out.weight)), key, value


def _looked_back(graph: Graph, query: str, key: str, value: str, keys: str, values: str, context: int) -> str:
    """Attend from a scaled query to a context and itself; joining the scores copies less than joining the keys."""
    own = graph.sum(graph.add("Mul", query, key))
    scores = graph.add("MatMul", query, graph.add("Transpose", keys, perm=[0, 1, 3, 2]))
    shares = graph.softmax(graph.joined(scores, own))
    before, at = graph.add("Split", shares, graph.constant(np.array([context, 1])), results=2, axis=-1)
    return graph.add("Add", graph.add("MatMul", before, values), graph.add("Mul", at, value))


def _visited(graph: Graph, block: Block, x: str, top_k: int) -> str:
    """Return (1, T, D) after the experts."""
    moe = block.moe
    E, F2, D = moe.gate_up.shape
    normed = graph.rms_norm(x, moe.norm)
    scores = graph.product(normed, moe.router.weight)
    _, places = graph.add("TopK", scores, graph.constant(np.array([top_k])), results=2, axis=-1)
    shares = graph.softmax(scores)
    none = graph.add("Mul", shares, graph.constant(np.float32(0)))
    chosen = graph.add("GatherElements", shares, places, axis=-1)
    weights = graph.add("ScatterElements", none, places, chosen, axis=-1)
    gate, up = (graph.product(normed, part.reshape(-1, D)) for part in moe.gate_up.chunk(2, dim=1))
    hidden = graph.shaped(graph.add("Mul", graph.gate(gate), up), 0, 0, E, F2 // 2)
    weighted = graph.add("Mul", hidden, graph.add("Unsqueeze", weights, graph.constant(np.array([-1]))))
    down = moe.down.permute(1, 0, 2).reshape(D, -1)
    return graph.add("Add", x, graph.product(graph.shaped(weighted, 0, 0, E * F2 // 2), down))


def _decoder_graph(model: Molmo, plan: Plan, length: int | None, context: int | None) -> Graph:
    """Write the plan's blocks and the head."""
    decoder, graph = model.decoder, Graph()
    D, H = model.config.width, model.config.num_heads
    y = graph.input("x", [1, length or "T", D])
    tables = []
    for table in (decoder.rotary.cos, decoder.rotary.sin):
        if length is None:
            end = graph.add("Shape", y, start=1, end=2)
            sizes = (graph.constant(np.array([0])), end, graph.constant(np.array([0])))
            tables.append(graph.add("Slice", graph.constant(table), *sizes))
        else:
            start = context or 0
            tables.append(graph.constant(table[start : start + length]))
    entries = []
    for i, (index, top_k) in enumerate(plan.steps):
        block = cast(Block, decoder.blocks[index])
        shape = [1, H, context or 0, D // H]
        past = [graph.input(f"{name}{i}", shape) for name in ("keys", "values")] if context else []
        y, *own = _attended(graph, block, y, tables, past, context or 0)
        y = _visited(graph, block, y, top_k)
        entries += own
    last = graph.add("Gather", y, graph.constant(np.int64(-1)), axis=1)
    for name in (graph.linear(graph.rms_norm(last, decoder.norm), decoder.head), *entries):
        graph.output(name)
    return graph


def _vision_graph(model: Molmo, crops: int) -> Graph:
    vision, graph = model.vision, Graph()
    width, places = vision.patch_embedding.out_features, vision.positions.shape[0]
    patches = graph.input("patches", [crops, places - 1, vision.patch_embedding.in_features])
    first = graph.constant(vision.class_embedding.expand(crops, 1, width))
    x = graph.joined(first, graph.linear(patches, vision.patch_embedding), axis=1)
    x = graph.layer_norm(graph.add("Add", x, graph.constant(vision.positions)), vision.pre_norm)
    kept = {}
    for i in range(max(vision.keep) + 1):
        block = cast(VisionBlock, vision.blocks[i])
        qkv = graph.linear(graph.layer_norm(x, block.attention_norm), block.qkv)
        mixed = graph.attention(*graph.split(qkv, 3), heads=block.num_heads)
        x = graph.add("Add", x, graph.linear(mixed, block.out))
        hidden = graph.gate(graph.linear(graph.layer_norm(x, block.mlp_norm), block.up), SIGMOID_SLOPE)
        x = graph.add("Add", x, graph.linear(hidden, block.down))
        bounds = (graph.constant(np.array([at])) for at in (1, places, 1))
        kept[i] = graph.add("Slice", x, *bounds)
    graph.output(graph.joined(*(kept[i] for i in vision.keep)))
    return graph


def _projector_graph(model: Molmo, crops: int) -> Graph:
    projector, graph = model.projector, Graph()
    s, p, H = projector.side, projector.pool, projector.num_heads
    wide, width, count = projector.query.in_features, projector.query.out_features, crops * projector.side**2
    features = graph.input("features", [crops, (s * p) ** 2, wide])
    masks = graph.input("masks", [crops, (s * p) ** 2])
    zero, one = graph.constant(np.float32(0)), graph.constant(np.float32(1))
    share = graph.add("Unsqueeze", masks, graph.constant(np.array([-1])))
    empty = graph.add("Equal", share, zero)
    partial = graph.add("And", graph.add("Less", share, one), graph.add("Not", empty))
    x = features
    for row, where in zip(projector.pad_embedding, (empty, partial), strict=True):
        factor = graph.add("Cast", where, to=TensorProto.FLOAT)
        x = graph.add("Add", x, graph.add("Mul", graph.constant(row), factor))
    split = graph.add("Transpose", graph.shaped(x, -1, s, p, s, p, wide), perm=[0, 1, 3, 2, 4, 5])
    windows = graph.shaped(split, count, p * p, wide)
    mean = graph.add("ReduceMean", windows, graph.constant(np.array([1])), keepdims=1)
    query = graph.shaped(graph.linear(mean, projector.query), count, 1, H, width // H)
    parts = graph.split(graph.linear(windows, projector.key_value), 2)
    key, value = (graph.shaped(part, count, p * p, H, width // H) for part in parts)
    scores = graph.sum(graph.add("Mul", query, key))
    scores = graph.add("Mul", scores, graph.constant(np.float32((width // H) ** -0.5)))
    mixed = graph.sum(graph.add("Mul", graph.softmax(scores, axis=1), value), axis=1)
    pooled = graph.linear(graph.shaped(mixed, crops, s * s, width), projector.out)
    gate, up = graph.split(graph.linear(pooled, projector.gate_up), 2)
    graph.output(graph.linear(graph.add("Mul", graph.gate(gate), up), projector.down))
    return graph
