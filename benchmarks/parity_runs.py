"""Teacher-forced logits of the same weights along two paths, and their distance.

`exact` is the model operation by operation in float32, which golden tests hold against the published numbers on a
reduced config. `fast` is what the engine serves: the prompt and every further token through its kernels and graphs
if there are any. Both read the same prompts and the same continuation, the greedy one of `exact`. Weights are
random: nothing here says how well a trained model answers.

A rounded router now and then takes the ninth expert for the eighth, and one such swap moves logits further than
all other rounding together. So a third run tells both apart: rounded as `fast` is, with the experts that `exact`
chose.

Shapes: `N` compared positions, the prompt's last token and each forced one, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine_reference import PlainTokenizer
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.plan import Plan, Step
from tempovlm.core.request import Request
from tempovlm.engine.cuda.graphs import GraphDecoder
from tempovlm.engine.runner import Prepared, Runner
from tempovlm.model.cache import KVCache
from tempovlm.model.config import ModelConfig, VisionConfig
from tempovlm.model.moe import MoE, best
from tempovlm.model.vision.tiling import Grid
from tempovlm.model.vlm import Molmo
from tempovlm.model.weights import empty_model

STEPS = 32
"""Tokens of the continuation."""

LIMIT = 2e-2
"""Largest logit error allowed in bfloat16, over the largest logit of its position."""


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt: a picture that its tier cuts by `grid`, or none, and this many words."""

    name: str
    tier: str
    grid: Grid | None
    num_words: int


CASES = (
    Case("text", "low", None, 37),
    Case("1 crop", "low", Grid(1, 1), 17),
    Case("7 crops", "medium", Grid(2, 3), 30),
    Case("13 crops", "high", Grid(3, 4), 51),
)
"""With MolmoE-1B's crops 40, 336, 773 and 1250 tokens; of `1 crop`, global crop and tile are the same pixels."""


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Molmo:
    """A model whose activations stay near 1: matrices scaled by their inputs, routers twice that, norms near 1."""
    model, generator = empty_model(config, device, dtype), torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        if owner.endswith("norm"):
            parameter.normal_(float(kind == "weight"), 0.1, generator=generator)
        elif kind == "bias":
            parameter.normal_(0, 0.1, generator=generator)
        elif kind in ("embedding", "class_embedding", "pad_embedding", "positions"):
            parameter.normal_(0, 0.7, generator=generator)
        else:
            peak = 2 if owner.endswith("router") else 1
            parameter.normal_(0, peak * parameter.shape[-1] ** -0.5, generator=generator)
    return model


def in_float32(model: Molmo) -> Molmo:
    """A copy of the same weights."""
    exact = empty_model(model.config, model.decoder.embedding.device, torch.float32)
    exact.load_state_dict(model.state_dict())
    return exact


def runner(model: Molmo, graphs: GraphDecoder | None = None) -> Runner:
    """The engine's stages on a model, with pixels as the published preprocessing makes them."""
    vocabulary = model.config.embedding_size
    tokenizer: Any = PlainTokenizer(vocabulary, vocabulary - 5)
    return Runner(model, tokenizer, exact=True, graphs=graphs)


def native_plan(config: ModelConfig) -> Plan:
    """All blocks at the trained top-k."""
    knobs = KnobConfig(tier="high", top_k=config.top_k, num_blocks=config.num_blocks)
    return Plan(knobs, tuple(Step(i, config.top_k) for i in range(config.num_blocks)))


def picture(grid: Grid, vision: VisionConfig) -> np.ndarray:
    """Random tiles of 8 × 8 pixels, a little lower than the grid's canvas, so that some patches are padded."""
    height, width = grid.canvas(vision)
    coarse = np.random.default_rng(height * width).integers(0, 256, (height // 8 - 2, width // 8, 3), np.uint8)
    return coarse.repeat(8, axis=0).repeat(8, axis=1)


def prepared(run: Runner, case: Case) -> Prepared:
    """The crops and the token stream of a case."""
    question = " ".join(f"w{i * i % 97}" for i in range(case.num_words))
    request = Request(images=(), question=question, style="", max_new_tokens=STEPS + 1)
    image = None if case.grid is None else picture(case.grid, run.model.config.vision)
    ready = run.prepare(image, case.tier, request)
    found = None if ready.crops is None else ready.crops.grid
    if found != case.grid:
        raise ValueError(f"case {case.name}: the picture was cut by {found}")
    return ready


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 matrices in float32, and attention as written."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.inference_mode()
def logits_along(run: Runner, ready: Prepared, plan: Plan, forced: Tensor | None = None) -> Tensor:
    """Logits (N, V), float32, after the prompt and after each token of `forced` (N - 1,); greedy without it."""
    device = run.device
    features = run.project(run.encode(ready.crops), ready.crops)
    with nullcontext() if run.graphs is None else run.graphs.lane() as lane:
        state = run.prefill(ready.prompt, features, plan, STEPS + 1, lane)
        rows = [state.logits.float()]
        if lane is not None:
            lane.on.position.fill_(state.length)
        for number in range(1, STEPS + 1):
            token = rows[-1].argmax(-1) if forced is None else forced[number - 1 : number].to(device)
            if lane is None:
                rows.append(run.decode(token, state, number).float())
                continue
            lane.on.token.copy_(token)
            lane.start_step(plan)
            rows.append(lane.on.logits.clone())
    return torch.cat(rows)


@contextmanager
def recorded_experts() -> Iterator[list[Tensor]]:
    """Yield the experts (tokens, top-k) of every visit to a router while the block runs, in order."""
    seen: list[Tensor] = []
    route = MoE.route

    def record(self: MoE, x: Tensor, top_k: int, limits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weights, experts = route(self, x, top_k, limits)
        seen.append(experts)
        return weights, experts

    with patch.object(MoE, "route", record):
        yield seen


class ForcedExperts:
    """Routes as was recorded, with weights by the router's own probabilities; counts where it would differ."""

    def __init__(self, recorded: list[Tensor]) -> None:
        self._rest = iter(recorded)
        self.visits = 0
        self.differing = 0

    def route(self, layer: MoE, x: Tensor, top_k: int, limits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights (tokens, top-k) and experts of (tokens, width); no token has a limit of its own."""
        assert limits is None
        scores, forced = layer.scores(x), next(self._rest)
        own = best(scores, top_k)
        self.visits += len(own)
        self.differing += int((own.sort(-1).values != forced.sort(-1).values).any(-1).sum())
        return scores.softmax(dim=-1).gather(-1, forced).to(x.dtype), forced


@torch.inference_mode()
def logits_with_experts(
    fast: Runner, exact: Molmo, ready: Prepared, plan: Plan, forced: Tensor, recorded: list[Tensor]
) -> tuple[Tensor, ForcedExperts]:
    """Logits (N, V) with the experts that were recorded along the exact path.

    The prompt is read in the fast type; the tokens after it in float32 over the rounded cache, as the decode
    kernels compute.
    """
    experts, plain = ForcedExperts(recorded), Runner(fast.model, fast.tokenizer, exact=True)
    with patch.object(MoE, "route", lambda *given: experts.route(*given)):
        features = plain.project(plain.encode(ready.crops), ready.crops)
        state = plain.prefill(ready.prompt, features, plan, STEPS + 1)
        rows, cache = [state.logits.float()], KVCache(state.cache.keys.float(), state.cache.values.float())
        for i in range(STEPS):
            rows.append(exact.decode(forced[i : i + 1].to(plain.device), plan, cache, state.length + i))
    return torch.cat(rows), experts


def compare(ours: Tensor, exact: Tensor) -> dict[str, Any]:
    """Return how far (N, V) logits are from exact ones, and whether greedy tokens are equal where they are clear.

    A token is clear where the exact logits' largest is ahead of the second by more than the largest error that any
    logit of any position has.
    """
    error = (ours - exact).abs().amax(1)
    relative = error / exact.abs().amax(1)
    top = exact.topk(2).values
    is_clear = top[:, 0] - top[:, 1] > error.max()
    is_equal = ours.argmax(1) == exact.argmax(1)
    return {
        "max_relative_logit_error": float(relative.max()),
        "median_relative_logit_error": float(relative.median()),
        "prompt_relative_logit_error": float(relative[0]),
        "relative_norm_error": float((ours - exact).norm() / exact.norm()),
        "within_limit": int((relative <= LIMIT).sum()),
        "positions": len(is_equal),
        "clear": int(is_clear.sum()),
        "clear_and_equal": int((is_clear & is_equal).sum()),
        "equal": int(is_equal.sum()),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The worst error and all counts of some comparisons."""
    counts = ("positions", "within_limit", "clear", "clear_and_equal", "equal")
    worst = ("max_relative_logit_error", "relative_norm_error")
    return {
        **{name: max(row[name] for row in rows) for name in worst},
        "median_relative_logit_error": float(np.median([row["median_relative_logit_error"] for row in rows])),
        **{name: sum(row[name] for row in rows) for name in counts},
    }


Peer = Callable[[Prepared, Tensor], dict[str, Tensor]]
"""Gives the logits (N, V) of other implementations, by name, for a prompt and its forced tokens."""


def measure_case(exact: Runner, fast: Runner, case: Case, peer: Peer | None = None) -> dict[str, Any]:
    """Compare the paths on one case; the peers, if there are any, with both."""
    plan, ready = native_plan(exact.model.config), prepared(exact, case)
    with full_float32(), recorded_experts() as experts:
        expected = logits_along(exact, ready, plan)
    forced = expected.argmax(-1)[:-1]
    if fast.graphs is not None:
        fast.graphs.warmup([plan], lengths=[len(ready.prompt.tokens)])
    ours = logits_along(fast, ready, plan, forced)
    row = {"name": case.name, "tokens": len(ready.prompt.tokens), **compare(ours, expected)}
    if fast.graphs is not None:
        with fast.graphs.lane() as lane:
            row["by_graphs"] = lane is not None and lane.has_graph(plan) and not lane.prompts.wanted
    logits, routes = logits_with_experts(fast, exact.model, ready, plan, forced, experts)
    row["same_experts"] = compare(logits, expected)
    row["other_experts_share"] = routes.differing / routes.visits
    for name, theirs in ({} if peer is None else peer(ready, forced)).items():
        row[name] = {
            "fast_against_it": compare(ours, theirs),
            "exact_against_it": compare(expected, theirs),
            "it_against_exact": compare(theirs, expected),
        }
    return row
