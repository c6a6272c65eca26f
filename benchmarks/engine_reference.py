"""References of the engine's benchmark: float32 models, a generic library's loop, random models.

Every check draws fresh inputs and ends the process with one line if an error is too large.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tempovlm.core.decode_dtype import DecodeDtype
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.plan import Plan, Step
from tempovlm.core.request import Request
from tempovlm.engine.cuda.graphs import Lane
from tempovlm.engine.engine import Engine
from tempovlm.engine.runner import Decoding, Runner
from tempovlm.model.attention import Span
from tempovlm.model.cache import KVCache
from tempovlm.model.config import PRESETS
from tempovlm.model.decoder import Decoder
from tempovlm.model.layers import norm_rotate, swiglu
from tempovlm.model.prompt import IMAGE_COLUMN, IMAGE_END, IMAGE_PATCH, IMAGE_START, Prompt, Tokenizer
from tempovlm.model.quantised import imitate
from tempovlm.model.vlm import Molmo
from tempovlm.model.weights import empty_model

QUESTION = "what does the sign say?"
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-4}


class PlainTokenizer(Tokenizer):
    """Stands in for a tokenizer where weights are random: words become numbers, numbers become text."""

    def __init__(self, vocabulary: int, end: int) -> None:
        self.vocabulary, self.end = vocabulary, end
        names = (IMAGE_PATCH, IMAGE_COLUMN, IMAGE_START, IMAGE_END)
        self.ids = {name: vocabulary - 1 - i for i, name in enumerate(names)}

    def encode(self, text: str) -> list[int]:
        """A token for each word."""
        return [16 + sum(word.encode()) % (self.vocabulary - 32) for word in text.split()]

    def decode(self, tokens: list[int]) -> str:
        """The numbers."""
        return " ".join(map(str, tokens))


@torch.inference_mode()
def loop_forward(model: Molmo, x: Tensor, plan: Plan, past: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
    """Logits (1, V) after (1, T, D), as a generic library computes them; `past` is extended by concatenation."""
    decoder = model.decoder
    start = past[0][0].shape[2] if past else 0
    positions = torch.arange(start, start + x.shape[1], device=x.device).unsqueeze(0)
    span = Span(start, *decoder.rotary(positions), None)
    for i, (index, top_k) in enumerate(plan.steps):
        block: Any = decoder.blocks[index]
        attention, moe = block.attention, block.moe
        q, k, v = attention.qkv(attention.norm(x)).chunk(3, dim=-1)
        q = norm_rotate(attention.q_norm, q, span.cos, span.sin).transpose(1, 2)
        k = norm_rotate(attention.k_norm, k, span.cos, span.sin).transpose(1, 2)
        v = v.view(*v.shape[:2], attention.num_heads, -1).transpose(1, 2)
        if i in past:
            k, v = (torch.cat(pair, dim=2) for pair in zip(past[i], (k, v), strict=True))
        past[i] = k, v
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1)
        x = x + attention.out(mixed.transpose(1, 2).reshape(x.shape))
        flat = moe.norm(x).view(-1, x.shape[-1])
        weights, experts = moe.route(flat, top_k)
        added = torch.zeros_like(flat)
        for expert in experts.unique():
            rows, places = torch.where(experts == expert)
            hidden = swiglu(F.linear(flat[rows], moe.gate_up[expert]))
            scaled = F.linear(hidden, moe.down[expert]) * weights[rows, places].unsqueeze(1)
            added.index_add_(0, rows, scaled)
        x = x + added.view_as(x)
    return decoder.logits(x[:, -1])


def fill(model: Molmo) -> Molmo:
    """Random weights; norms of one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02)
    return model


def engine_of(model: Molmo, name: str, decode_dtype: DecodeDtype = "bf16") -> Engine:
    """An engine whose answers never end before their cap: no token is the end."""
    vocabulary = model.config.embedding_size
    tokenizer: Any = PlainTokenizer(vocabulary, vocabulary - 5)
    with torch.no_grad():
        model.decoder.head.weight[tokenizer.end] = 0.0  # before an engine copies its weights
    return Engine(model, tokenizer, name=name, decode_dtype=decode_dtype)


def engine_without_end(loaded: Engine, decode_dtype: DecodeDtype) -> Engine:
    """A loaded engine, whose answers seldom end before their cap: the end token's logit is zero."""
    run = loaded.runner
    with torch.no_grad():
        run.model.decoder.head.weight[run.tokenizer.end] = 0.0
    return Engine(
        run.model,
        run.tokenizer,
        ranking=loaded.ranking,
        name=loaded.name,
        exact=run.exact,
        decode_dtype=decode_dtype,
        precision=None if run.stages is None else run.stages.precision,
    )


def check(
    preset: str, device: torch.device, dtype: torch.dtype, decode_dtype: DecodeDtype = "bf16"
) -> dict[str, float]:
    """A decode step and the grouped experts against float32 on a model of two blocks, and equal tokens.

    Steps on one-byte weights are compared with float32 on the values that those represent; their distance from
    float32 on the weights as loaded is reported beside it (`weights_error`).
    """
    config = replace(PRESETS[preset], num_blocks=2)
    fast = fill(empty_model(config, device, dtype))
    exact = empty_model(config, device, torch.float32)
    run, context = engine_of(fast, "check", decode_dtype).runner, 77
    exact.load_state_dict(fast.state_dict())
    meant = exact.decoder if decode_dtype == "bf16" else imitate(exact.decoder, decode_dtype)
    found = {}
    for top_k in sorted({1, 4, 6, 8, 10, 12, min(16, config.num_experts)}):
        plan = Plan(KnobConfig(tier="low", top_k=top_k, num_blocks=2), (Step(0, top_k), Step(1, top_k)))
        with run.lane() as lane:
            small = KVCache.allocate(config, 2, 1, context + 40, fast.decoder.embedding)
            cache = small if lane is None else lane.cache_for(plan)
            for values in (cache.keys, cache.values):
                values[:, :, :, :context].normal_()
                values[:, :, :, context:].fill_(torch.nan)
            copy = KVCache(cache.keys.float(), cache.values.float())
            token = torch.tensor([top_k + 3], device=device)
            expected = _step(meant, token, plan, copy, context)
            logits = _decode_once(run, lane, plan, cache, token, context)
            error = _relative(logits, expected)
            if decode_dtype != "bf16":
                found[f"weights_error_k{top_k}"] = _relative(logits, exact.decode(token, plan, copy, context))
        found[f"logit_error_k{top_k}"] = error
        _require(error <= TOLERANCE[dtype], f"decode k{top_k}: logits differ from float32 by {error:.2e}")
    if device.type == "cuda":
        found |= _check_graphs(run, plan) | _check_experts(exact, fast)
    return found


def _step(decoder: Decoder, token: Tensor, plan: Plan, cache: KVCache, place: int) -> Tensor:
    """Logits (1, V) after one more token, module by module."""
    hidden = decoder(decoder.embed(token.unsqueeze(1)), token.new_full((1, 1), place), plan, cache, place)
    return decoder.logits(hidden[:, -1])


def _relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.float() - exact).norm() / exact.norm())


def _require(is_met: bool, complaint: str) -> None:
    if not is_met:
        sys.exit(f"self-check failed: {complaint}")


def _decode_once(
    run: Runner, lane: Lane | None, plan: Plan, cache: KVCache, token: Tensor, context: int
) -> Tensor:
    if lane is None:
        return run.decode(token, Decoding(token, plan, cache, context), 1)
    lane.on.token.copy_(token)
    lane.on.position.fill_(context)
    lane.on.logits.fill_(torch.nan)
    lane.start_step(plan)
    return lane.on.logits


def _check_graphs(run: Runner, plan: Plan) -> dict[str, float]:
    """Tokens of kernels one by one, then of a graph."""
    request = Request(images=(), question=QUESTION, max_new_tokens=32)
    prompt = Prompt(torch.arange(20) + 16, None, 0)
    made = []
    for _ in range(2):
        with run.lane() as lane:
            state = run.prefill(prompt, None, plan, 32, lane)
            first = state.logits.argmax(dim=-1)
            made.append([step.token for step in run.steps(first, state, lambda x: x.argmax(-1), request)])
        assert run.graphs is not None
        # The step alone: a padded prompt rounds otherwise, and random logits in bfloat16 flip by rounding.
        run.graphs.warmup([plan])
    _require(made[0] == made[1], f"tokens of the graph {made[1]} are not those of its kernels {made[0]}")
    return {"tokens_compared": len(made[0])}


def _check_experts(exact: Molmo, fast: Molmo) -> dict[str, float]:
    """The experts of a prompt in the fast type, routed as there, against float32."""
    ours: Any = fast.decoder.blocks[0].moe
    plain: Any = exact.decoder.blocks[0].moe
    x = torch.randn(333, ours.down.shape[1], device=ours.down.device, dtype=ours.down.dtype)
    weights, experts = ours.route(x, 8)
    from tempovlm.model.kernels import experts as kernels

    out = kernels.grouped(x, weights, experts, ours.gate_up, ours.down)
    expected = plain.grouped(x.float(), weights.float(), experts)
    error = _relative(out, expected)
    _require(error <= TOLERANCE[torch.bfloat16], f"grouped experts differ from float32 by {error:.2e}")
    return {"expert_error": error}
