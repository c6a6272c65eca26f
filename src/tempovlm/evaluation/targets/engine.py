"""Rows about the engine: MolmoE-1B's shapes with random weights on an H200, and the pocket's decoding on a CPU."""

from __future__ import annotations

import re
from itertools import pairwise

from tempovlm.evaluation.targets.base import (
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

ENGINE = "Engine"

_H200, _CPU = ("benchmarks/results/engine_h200.json", "benchmarks/results/engine_cpu.json")
H200 = Source(
    path=_H200,
    command=f"python benchmarks/engine.py --model molmoe-1b --random-weights --json {_H200}",
    model="molmoe-1b",
    hardware="H200",
)
CPU = Source(
    path=_CPU,
    command=f"python benchmarks/engine.py --model pocket --device cpu --json {_CPU}",
    model="pocket",
    hardware="cpu",
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


def _speed_up(content: Content) -> Reading:
    """Tokens a second now over those of the first version, which decoded as the peer `eager` does."""
    row = row_named(content, "decode_k8_b16_ctx700")
    return Reading(value_at(row, "peers", "eager") / value_at(row, "ms_median"))


def _row(name: str, about: str, bound: Bound, unit: str, measure: Measure, text: str | None = None) -> Target:
    return Target(ENGINE, name, about, bound, unit, H200, measure, text=text)


def _rows() -> list[Target]:
    rows = []
    for name, (about, first_ms, goal_ms) in WORK.items():
        for kind, limit_ms in (("first", first_ms), ("goal", goal_ms)):
            text = f"≤ {limit_ms:g} ms ({'first target' if kind == 'first' else 'goal'})"
            rows.append(_row(f"{name}_{kind}", about, Bound("≤", limit_ms), "ms", _median(name), text=text))
    within = "0 pairs faster beyond 2 % noise"
    return [
        *rows,
        _row(
            "monotone_tier_and_depth",
            "75 settings: tier or depth up, total faster",
            Bound("≤", 0),
            "pairs",
            _monotone(("ms_median",), 0, 2),
            text=within,
        ),
        _row(
            "monotone_top_k_decode",
            "75 settings: top-k up, decoded token faster",
            Bound("≤", 0),
            "pairs",
            _monotone(("stages_ms", "decode"), 1),
            text=within,
        ),
        _row(
            "warmup_all_plans",
            "cold start with all 75 settings",
            Bound("≤", 60),
            "s",
            field("warmup_ms", scale=1e-3),
        ),
        _row(
            "gpu_memory",
            "GPU memory in all, bfloat16, cache of 4096 tokens",
            Bound("≤", 18),
            "GB",
            field("peak_gb"),
        ),
        Target(
            ENGINE,
            "decode_speed_up_cpu",
            "the pocket's tokens a second over the first version's",
            Bound("≥", 2),
            "×",
            CPU,
            _speed_up,
        ),
    ]


ROWS = tuple(_rows())
