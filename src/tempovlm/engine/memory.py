"""GPU memory that serving a model needs, estimated from its sizes before anything is loaded."""

from __future__ import annotations

from tempovlm.core.knobs import KnobSpace
from tempovlm.engine.cuda.capture import GRAPH_LIMIT
from tempovlm.engine.cuda.rows import ROWS, row_tokens
from tempovlm.engine.cuda.vision_graphs import MAX_CROPS
from tempovlm.model.config import ModelConfig
from tempovlm.model.packed import can_run_rows

VALUE_BYTES = 2
"""Of a bfloat16 number."""

FIXED_BYTES = 77_000_000
"""Workspaces of matrix products, whatever the model."""

POOLS = 3.19
"""Memory of the graphs' pool and buffers in multiples of the activations of the largest prompt and picture.

This and `FIXED_BYTES` solve reserved = weights + cache + FIXED_BYTES + POOLS * activations for the two models that
were measured, MolmoE-1B and the pocket (`benchmarks/results/memory_molmoe_h200.json`, `memory_pocket_h200.json`).
"""

CONTEXT_BYTES = 400_000_000
"""CUDA context and kernels, which torch does not count: `device_gb` - `reserved_gb` of the same files."""


def serving_bytes(config: ModelConfig, parameters: int) -> dict[str, int]:
    """Return the bytes of GPU memory that serving in bfloat16 needs, by what takes them.

    Args:
        config: sizes of the model.
        parameters: number of weights.
    """
    a_token = 2 * config.num_blocks * config.kv_heads * config.head_width * VALUE_BYTES
    in_rows = ROWS * row_tokens(config) if can_run_rows(config) else 0
    return {
        "weights": parameters * VALUE_BYTES,
        "cache": (config.max_sequence_length + in_rows) * a_token,
        "graphs_and_activations": FIXED_BYTES + round(POOLS * _activation_bytes(config)),
        "cuda_context": CONTEXT_BYTES,
    }


def _activation_bytes(config: ModelConfig) -> int:
    """Return the bytes of one decoder block's and one vision block's values for the largest prompt and picture."""
    vision, shape = config.vision, config.shape
    tokens = min(GRAPH_LIMIT, config.max_sequence_length)
    top_k = KnobSpace.for_model(shape).largest.top_k
    prompt = tokens * (top_k * (config.width + config.expert_width) + 4 * config.width)
    picture = MAX_CROPS * vision.num_patches * (shape.image_mlp_width + 6 * shape.image_width)
    return (prompt + picture) * VALUE_BYTES
