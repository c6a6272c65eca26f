"""transformers' OLMoE beside the engine: the same decoder sizes, random weights, each stage at its best setting.

Prompts are read by grouped products, operation by operation (their graph capture is not supported there); tokens
are decoded over a static cache by a compiled step that gathers its experts. It has depth but no plan: all blocks
and the trained top-k, so only rows of these have such a peer. Time is bounded between its parts; one compilation
may pass the bound.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from engine_timing import timed
from tempovlm.core.units import now_ms
from tempovlm.model.config import ModelConfig
from tempovlm.model.vlm import Molmo

_PREFILL = re.compile(r"prefill_t(\d+)_k8_b16")
_DECODE = re.compile(r"decode_k8_b16_ctx(\d+)")
_WARM_STEPS = 8
"""Steps before a compiled one is timed: it is compiled, recorded and replayed in the first of them."""


def add_transformers(
    rows: list[dict[str, Any]], model: Molmo, repeats: int, limit_s: float, save: Callable[[], None]
) -> dict[str, str]:
    """Put transformers' times beside the rows that it can have; its version, and what was left out and why."""
    try:
        found = {"version": metadata.version("transformers")}
    except metadata.PackageNotFoundError:
        return {"note": "transformers is not installed"}
    if not model.decoder.embedding.is_cuda:
        return found | {"note": "its peers are timed on a GPU"}
    end_ms = now_ms() + limit_s * 1e3
    try:
        peer = Olmoe(model.config, model.decoder.embedding.device, repeats)
        for row, name, run in _jobs(rows, peer):
            if now_ms() > end_ms:
                return found | {"note": f"the time ended before {row['name']}"}
            row["peers"][name] = statistics.median(run())
            save()
    except Exception as error:  # noqa: BLE001 - a peer that fails must not lose the engine's rows
        found["note"] = " ".join(f"failed: {type(error).__name__}: {error}".split())[:300]
        print(f"transformers: {found['note']}", file=sys.stderr)
    return found


def _jobs(
    rows: list[dict[str, Any]], peer: Olmoe
) -> Iterator[tuple[dict[str, Any], str, Callable[[], list[float]]]]:
    """Prompts first: the compiled step is what may fail or take long."""
    for row in rows:
        if found := _PREFILL.fullmatch(row["name"]):
            length = int(found[1])
            yield row, "transformers_grouped_mm", lambda length=length: peer.prefill(length)
    for row in rows:
        if found := _DECODE.fullmatch(row["name"]):
            context = int(found[1])
            yield row, "transformers_static_compiled", lambda context=context: peer.decode(context)


class Olmoe:
    """The library's model on a device."""

    def __init__(self, config: ModelConfig, device: torch.device, repeats: int) -> None:
        from transformers import AutoModelForCausalLM, OlmoeConfig

        theirs = OlmoeConfig(
            vocab_size=config.embedding_size,
            hidden_size=config.width,
            intermediate_size=config.expert_width,
            num_hidden_layers=config.num_blocks,
            num_attention_heads=config.num_heads,
            max_position_embeddings=config.max_sequence_length,
            num_experts=config.num_experts,
            num_experts_per_tok=config.top_k,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
        self.device, self.repeats, self.limit = device, repeats, config.max_sequence_length
        with device:
            model = AutoModelForCausalLM.from_config(theirs, dtype=torch.bfloat16, attn_implementation="sdpa")
        self.model: Any = model.to(device).eval()

    def tokens(self, length: int) -> Tensor:
        """Some tokens (1, length)."""
        return (torch.arange(length, device=self.device) % 97 + 16).unsqueeze(0)

    @torch.inference_mode()
    def prefill(self, length: int) -> list[float]:
        """Times of reading a prompt, for the last token's logits, into a cache that grows."""
        self.model.set_experts_implementation("grouped_mm")
        tokens = self.tokens(length)
        return timed(lambda: self.model(tokens, use_cache=True, logits_to_keep=1), self.repeats, self.device)

    @torch.no_grad()
    def decode(self, context: int) -> list[float]:
        """Times of one more token after `context` others; the context grows by the few steps that are timed."""
        from transformers import StaticCache

        room = context + _WARM_STEPS + self.repeats + 8
        cache = StaticCache(config=self.model.config, max_cache_len=min(room, self.limit))
        self.model.set_experts_implementation("grouped_mm")
        self.model(self.tokens(context), past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.model.set_experts_implementation("batched_mm")
        step = torch.compile(self.model.__call__, mode="reduce-overhead")
        token = self.tokens(1)

        def once() -> None:
            torch.compiler.cudagraph_mark_step_begin()
            step(token, past_key_values=cache, use_cache=True)

        for _ in range(_WARM_STEPS):
            once()
        torch.cuda.synchronize(self.device)
        return timed(once, self.repeats, self.device)
