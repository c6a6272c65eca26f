"""Rows about the engine: MolmoE-1B's shapes with random weights on GPUs, and the pocket's decoding on a CPU."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise

from tempovlm.evaluation.targets.base import (
    REPORTED,
    AbsentError,
    Bound,
    Content,
    Measure,
    Reading,
    Source,
    Target,
    field,
    look_up,
    row_named,
    value_at,
)
from tempovlm.evaluation.targets.devices import GPUS, HARDWARE, PLACE, suffix

ENGINE = "Engine"

_RESULTS = "benchmarks/results"


def _on_gpu(gpu: str, name: str, more: str = "") -> Source:
    path = f"{_RESULTS}/{name}_{gpu}.json"
    return Source(
        path=path,
        command=f"python benchmarks/engine.py --model molmoe-1b --random-weights {more}--json {path}",
        model="molmoe-1b",
        hardware=HARDWARE[gpu],
    )


LOADED = {gpu: _on_gpu(gpu, "engine") for gpu in GPUS}
FP8 = {gpu: _on_gpu(gpu, "engine_fp8", "--weights fp8 ") for gpu in GPUS}
CPU = Source(
    path=f"{_RESULTS}/engine_cpu.json",
    command=f"python benchmarks/engine.py --model pocket --device cpu --json {_RESULTS}/engine_cpu.json",
    model="pocket",
    hardware="cpu",
)
_QUANTISED = f"{_RESULTS}/quantised_pocket.json"
QUANTISED = Source(
    path=_QUANTISED,
    command=f"python benchmarks/quantised.py --model pocket --num_samples 200 --json {_QUANTISED}",
    model="pocket",
    hardware="cpu",
    needs_shipped_weights=True,
)

WORK = {
    "decode_k8_b16_ctx700": ("decode a token, k8, 16 blocks, context 700", 1.0, 0.75),
    "decode_k4_b8_ctx700": ("decode a token, k4, 8 blocks, context 700", 0.45, 0.32),
    "prefill_t336_k8_b16": ("prefill 336 tokens, k8, 16 blocks", 6.0, 4.5),
    "prefill_t1250_k8_b16": ("prefill 1250 tokens, k8, 16 blocks", 9.0, 6.0),
    "prefill_t2030_k8_b16": ("prefill 2030 tokens, k8, 16 blocks", 13.0, 9.0),
    "vision_c1": ("vision, 1 crop", 1.4, 1.0),
    "vision_c7": ("vision, 7 crops", 5.5, 4.5),
    "vision_c13": ("vision, 13 crops", 9.5, 8.5),
    "preprocess_1080p_high": ("preprocess a decoded 1920 × 1080 picture, high tier", 6.0, 3.0),
    "answer_1080p_high_k8_b16_n10": ("answer on 1920 × 1080, high tier, k8, 16 blocks, 10 tokens", 40.0, 30.0),
    "answer_low_k4_b8_n3": ("answer, low tier, k4, 8 blocks, 3 tokens", 9.0, 6.0),
}
"""Row of the benchmark → what it times, the first target and the goal in milliseconds."""

_SETTING = re.compile(r"(?:^|_)(low|medium|high)[/_]k(\d+)[/_]b(\d+)$")
"""How the name of the row of one of the 75 settings ends."""

_NUM_SETTINGS = 75
_NOISE = 0.02
_TIERS = ("low", "medium", "high")

Setting = tuple[int, int, int]


def settings_of(content: Content, *column: str) -> dict[Setting, float]:
    """(tier's place, top-k, blocks) → the number at a path of the rows of the 75 settings.

    Raises:
        AbsentError: not all of them are there.
    """
    found = {}
    for row in look_up(content, "rows"):
        match = _SETTING.search(str(row.get("name")))
        if match:
            found[_TIERS.index(match[1]), int(match[2]), int(match[3])] = value_at(row, *column)
    if len(found) != _NUM_SETTINGS:
        raise AbsentError(f"it has rows for {len(found)} of {_NUM_SETTINGS} settings")
    return found


def reversals(times_ms: dict[Setting, float], knob: int) -> int:
    """Pairs of settings, neighbours along one knob, of which the larger is faster beyond the noise."""
    values = sorted({setting[knob] for setting in times_ms})
    following = dict(pairwise(values))
    count = 0
    for setting, time_ms in times_ms.items():
        if setting[knob] in following:
            larger = (*setting[:knob], following[setting[knob]], *setting[knob + 1 :])
            count += times_ms[larger] < time_ms * (1 - _NOISE)  # type: ignore[index]
    return count


def _monotone(column: tuple[str, ...], *knobs: int) -> Measure:
    def measure(content: Content) -> Reading:
        times_ms = settings_of(content, *column)
        return Reading(float(sum(reversals(times_ms, knob) for knob in knobs)))

    return measure


def _median(name: str, scale: float = 1.0) -> Measure:
    return lambda content: Reading(value_at(row_named(content, name), "ms_median", scale=scale))


def _over_peer(name: str, peer: str) -> Measure:
    """Tokens a second over those of a peer."""

    def measure(content: Content) -> Reading:
        row = row_named(content, name)
        return Reading(value_at(row, "peers", peer) / value_at(row, "ms_median"))

    return measure


def _of_kind(kind: str, name: str, scale: float) -> Measure:
    """A field of one kind of weights."""

    def measure(content: Content) -> Reading:
        for row in look_up(content, "rows"):
            if row.get("weights") == kind:
                return Reading(value_at(row, name, scale=scale))
        raise AbsentError(f"there are no weights {kind}")

    return measure


def _stages(gpu: str) -> Iterable[Target]:
    def row(name: str, about: str, bound: Bound, unit: str, measure: Measure, text: str | None = None) -> Target:
        name, about = f"{name}{suffix(gpu)}", f"{about} ({PLACE[gpu]})"
        return Target(ENGINE, name, about, bound, unit, LOADED[gpu], measure, text=text)

    for name, (about, first_ms, goal_ms) in WORK.items():
        for kind, limit_ms in (("first", first_ms), ("goal", goal_ms)):
            text = f"≤ {limit_ms:g} ms ({'first target' if kind == 'first' else 'goal'})"
            yield row(f"{name}_{kind}", about, Bound("≤", limit_ms), "ms", _median(name), text)
    within = "0 pairs faster beyond 2 % noise"
    by_total, by_decode = _monotone(("ms_median",), 0, 2), _monotone(("stages_ms", "decode"), 1)
    about = "75 settings: tier or depth up, total faster"
    yield row("monotone_tier_and_depth", about, Bound("≤", 0), "pairs", by_total, within)
    about = "75 settings: top-k up, decoded token faster"
    yield row("monotone_top_k_decode", about, Bound("≤", 0), "pairs", by_decode, within)
    warmup_s = field("warmup_ms", scale=1e-3)
    yield row("warmup_all_plans", "cold start with all 75 settings", Bound("≤", 60), "s", warmup_s)
    about = "GPU memory in all, bfloat16, cache of 4096 tokens"
    yield row("gpu_memory", about, Bound("≤", 18), "GB", field("peak_gb"))


def _one_byte(gpu: str) -> Iterable[Target]:
    """Decoding on weights of one byte: its time, its gain, and what the logits lose."""
    for top_k, num_blocks in ((8, 16), (4, 8)):
        name = f"decode_k{top_k}_b{num_blocks}_ctx700"
        about = f"{WORK[name][0]}, fp8 weights"
        for row, words, unit, measure in (
            (f"{name}_fp8", about, "ms", _median(name)),
            (
                f"{name}_fp8_speed_up",
                f"{about}: tokens a second over those with bfloat16",
                "×",
                _over_peer(name, "bf16_weights"),
            ),
            (
                f"fp8_logit_error_k{top_k}",
                f"fp8 weights, k{top_k}: error of the logits by norm, two blocks of random weights",
                "%",
                field("checks", f"weights_error_k{top_k}", scale=100),
            ),
        ):
            yield Target(
                ENGINE, f"{row}{suffix(gpu)}", f"{words} ({PLACE[gpu]})", REPORTED, unit, FP8[gpu], measure
            )


def _quantised() -> Iterable[Target]:
    for kind in ("fp8", "int8"):
        for name, about, unit, column in (
            ("accuracy_loss", "accuracy lost on the test bed", "points", "accuracy_loss"),
            ("logit_error", "error of the logits by norm, mean of all steps", "%", "relative_logit_error_mean"),
        ):
            measure = _of_kind(kind, column, 100)
            yield Target(
                ENGINE,
                f"{kind}_{name}_pocket",
                f"{kind} weights, pocket: {about}",
                REPORTED,
                unit,
                QUANTISED,
                measure,
            )


ROWS = (
    *(target for gpu in GPUS for target in _stages(gpu)),
    *(target for gpu in GPUS for target in _one_byte(gpu)),
    *_quantised(),
    Target(
        ENGINE,
        "decode_speed_up_cpu",
        "the pocket's tokens a second over the first version's, which decoded as the peer `eager` does",
        Bound("≥", 2),
        "×",
        CPU,
        _over_peer("decode_k8_b16_ctx700", "eager"),
    ),
)
