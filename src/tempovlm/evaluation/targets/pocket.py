"""Rows about the product: the pocket on two cores, and what loading, parity and preprocessing cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from tempovlm.data.registry import GENERATED
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
    number,
    row_named,
    value_at,
)
from tempovlm.evaluation.targets.measuring import SWEEPS

POCKET, CHECKPOINTS = "Pocket", "Checkpoints and preprocessing"

BUDGETS_MS = (60, 100, 150, 200, 300)

_RESULTS = "benchmarks/results"
_NATIVE = ("high", 8, 16)
_LOWEST = {"tier": ("low", 8, 16), "top_k": ("high", 4, 16), "num_blocks": ("high", 8, 8)}

ACCURACY = Source(
    path="src/tempovlm/pocket/accuracy.json",
    command="python -m tempovlm.training.pocket --out RUN --device cuda --export",
    needs_shipped_weights=True,
    stamp="fields",
)
BENCH = Source(
    path=f"{_RESULTS}/pocket_cpu.json",
    command="tempovlm bench --budgets 60 100 150 200 300 --num_samples 200 --fresh_processes 10",
    model="pocket",
    hardware="cpu",
    needs_shipped_weights=True,
)
LOAD = Source(path=f"{_RESULTS}/load.json", command="python benchmarks/load.py", model="molmoe-1b", hardware="cpu")
PREPROCESS = Source(
    path=f"{_RESULTS}/preprocess.json",
    command=f"python benchmarks/preprocess.py --json {_RESULTS}/preprocess.json",
    hardware="cpu",
)


def _parity(device: str, suffix: str) -> Source:
    path = f"{_RESULTS}/parity_{suffix}.json"
    command = f"python benchmarks/parity.py --device {device} --json {path}"
    return Source(path=path, command=command, hardware="cpu" if suffix == "cpu" else suffix.upper())


PARITY_CPU, PARITY_H200 = _parity("cpu", "cpu"), _parity("cuda", "h200")


def accuracy_of(content: Content, setting: tuple[str, int, int], *path: str) -> float:
    """Percent right at one setting of the pocket's accuracy file, over all data sets unless `path` says one."""
    for one in look_up(content, "settings"):
        if (one.get("tier"), one.get("top_k"), one.get("num_blocks")) == setting:
            return value_at(one, *(path or ("accuracy",)), scale=100)
    raise AbsentError("there is no setting {}/k{}/b{}".format(*setting))


def _native(*path: str) -> Measure:
    return lambda content: Reading(accuracy_of(content, _NATIVE, *path))


def _reading_gap(content: Content) -> Reading:
    high, low = (accuracy_of(content, at, "by_dataset", "text_vqa") for at in (_NATIVE, _LOWEST["tier"]))
    return Reading(number(high - low, "by_dataset.text_vqa"))


def _kept(knob: str) -> Measure:
    def measure(content: Content) -> Reading:
        share = accuracy_of(content, _LOWEST[knob]) / accuracy_of(content, _NATIVE)
        return Reading(number(share, "accuracy", 100))

    return measure


def _lost(knob: str) -> Measure:
    def measure(content: Content) -> Reading:
        return Reading(number(accuracy_of(content, _NATIVE) - accuracy_of(content, _LOWEST[knob]), "accuracy"))

    return measure


def budget_row(content: Content, budget_ms: float) -> Content:
    """The entry of `budgets` for one budget.

    Raises:
        AbsentError: there is none.
    """
    for row in look_up(content, "budgets"):
        if row.get("budget_ms") == budget_ms:
            return row
    raise AbsentError(f"there is no budget of {budget_ms:g} ms")


def at_budget(budget_ms: float, *path: str | int, scale: float = 100) -> Measure:
    """A measure: the number at a path of one budget's entry."""
    return lambda content: Reading(value_at(budget_row(content, budget_ms), *path, scale=scale))


def _native_latency(content: Content) -> Reading:
    if look_up(content, "fixed", "knobs") != "{}/k{}/b{}".format(*_NATIVE):
        raise AbsentError("the fixed setting is not the native one")
    return Reading(value_at(content, "fixed", "p50_ms"))


def _accuracy_rows() -> list[Target]:
    def row(name: str, about: str, bound: Bound, unit: str, measure: Measure, text: str | None = None) -> Target:
        return Target(
            name=f"pocket_{name}",
            about=about,
            experiment=POCKET,
            bound=bound,
            unit=unit,
            source=ACCURACY,
            measure=measure,
            text=text,
        )

    return [
        row(
            "accuracy_native",
            "right at the native setting, mean of four data sets",
            Bound("≥", 80),
            "%",
            _native(),
        ),
        *(
            row(f"accuracy_{name}", f"right on {name}, native", Bound("≥", 75), "%", _native("by_dataset", name))
            for name in GENERATED
        ),
        row("reading_gap", "signs read, high tier minus low tier", Bound("≥", 25), "points", _reading_gap),
        *(
            row(f"kept_at_lowest_{knob}", f"accuracy kept at the lowest {knob}", Bound("≥", 50), "%", _kept(knob))
            for knob in _LOWEST
        ),
        *(
            row(
                f"lost_at_lowest_{knob}",
                f"accuracy lost at the lowest {knob}",
                Bound(">", 0),
                "points",
                _lost(knob),
                "> 0 points: each knob matters",
            )
            for knob in _LOWEST
        ),
    ]


def _bench_rows() -> list[Target]:
    def row(name: str, about: str, bound: Bound, unit: str, measure: Measure, text: str | None = None) -> Target:
        return Target(
            name=f"pocket_{name}",
            about=about,
            experiment=POCKET,
            bound=bound,
            unit=unit,
            source=BENCH,
            measure=measure,
            text=text,
        )

    wilson = "Wilson interval reaches 97 %"
    return [
        row("latency_native", "native setting, median", Bound("≤", 350), "ms", _native_latency),
        replace(
            row("latency_cheapest", "cheapest setting, median", Bound("≤", 45), "ms", field("fastest_ms")),
            source=SWEEPS["cpu"],
        ),
        *(
            row(
                f"adherence_{b}ms",
                f"on time at {b} ms, fresh processes included: upper end of the interval",
                Bound("≥", 97),
                "%",
                at_budget(b, "adherence_wilson", 1),
                wilson,
            )
            for b in BUDGETS_MS
        ),
        *(
            row(
                f"utilisation_{b}ms",
                f"budget used at {b} ms where a slower setting existed",
                Bound("≥", 60),
                "%",
                at_budget(b, "utilisation"),
            )
            for b in BUDGETS_MS
        ),
    ]


def _model_at(num_blocks: int, *path: str) -> Measure:
    def measure(content: Content) -> Reading:
        for one in look_up(content, "models"):
            if one.get("num_blocks") == num_blocks:
                return Reading(value_at(one, *path))
        raise AbsentError(f"there is no model of {num_blocks} blocks")

    return measure


def _preprocess(name: str) -> Measure:
    return lambda content: Reading(value_at(row_named(content, name), "ms_median"))


_pixels = field("fast_pixel_error", "max_levels")


def _accuracy_change(content: Content) -> Reading:
    """Accuracy of fast minus exact preprocessing, in points."""
    fast, exact = (value_at(content, "pocket", f"accuracy_{mode}") for mode in ("fast", "exact"))
    return Reading(number(fast - exact, "pocket.accuracy_fast", 100))


def _of_checkpoints(name: str, about: str, bound: Bound, unit: str, source: Source, measure: Measure) -> Target:
    return Target(
        name=name,
        about=about,
        experiment=CHECKPOINTS,
        bound=bound,
        unit=unit,
        source=source,
        measure=measure,
    )


def _load_rows() -> Iterable[Target]:
    for name, about, limit, num_blocks, path in (
        ("memory", "peak memory over the model's, MolmoE-1B's 16 blocks", 1.2, 16, "peak_over_model"),
        ("time", "loading over reading the bytes, MolmoE-1B's 16 blocks", 1.5, 16, "load_over_read"),
        ("time_warm", "loading over reading the bytes, 8 blocks, files in memory", 1.5, 8, "load_over_read"),
    ):
        yield _of_checkpoints(f"load_{name}", about, Bound("≤", limit), "×", LOAD, _model_at(num_blocks, path))


def _share_of_clear(content: Content) -> Reading:
    """Equal greedy tokens among those whose margin exceeds the error, in percent."""
    clear = number(look_up(content, "clear"), "clear")
    return Reading(100 * number(look_up(content, "clear_and_equal"), "clear_and_equal") / clear)


def _parity_rows() -> Iterable[Target]:
    largest, norm = field("max_relative_logit_error"), field("relative_norm_error")
    for name, about, bound, unit, source, measure in (
        (
            "cpu_float32",
            "largest logit error against the published code, over the largest logit",
            Bound("≤", 1e-4),
            "",
            PARITY_CPU,
            largest,
        ),
        ("h200_bfloat16", "the same in bfloat16 on an H200", Bound("≤", 2e-2), "", PARITY_H200, largest),
        ("h200_bfloat16_norm", "error of the logits by norm, bfloat16", Bound("≤", 2e-2), "", PARITY_H200, norm),
        (
            "h200_tokens",
            "equal tokens where the margin is clear",
            Bound("≥", 100),
            "%",
            PARITY_H200,
            _share_of_clear,
        ),
    ):
        yield _of_checkpoints(f"parity_{name}", about, bound, unit, source, measure)


def _preprocess_rows() -> Iterable[Target]:
    for mode, limit_ms in (("exact", 60), ("fast", 25)):
        about, measure = f"1920 × 1080 to high-tier crops, {mode}, one core", _preprocess(f"{mode}_1920x1080_high")
        yield _of_checkpoints(f"preprocess_{mode}", about, Bound("≤", limit_ms), "ms", PREPROCESS, measure)
    for name, about, bound, unit, measure in (
        ("pixel_error", "fast against exact pixels, largest difference", Bound("≤", 1), "of 255 levels", _pixels),
        ("accuracy_change", "the pocket's accuracy, fast minus exact", REPORTED, "points", _accuracy_change),
    ):
        yield _of_checkpoints(f"preprocess_{name}", about, bound, unit, PREPROCESS, measure)


ROWS = (*_accuracy_rows(), *_bench_rows(), *_load_rows(), *_parity_rows(), *_preprocess_rows())
