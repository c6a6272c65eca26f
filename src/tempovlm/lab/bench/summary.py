"""Records of measured requests, and the result object of `tempovlm bench` computed from them.

Pure functions on records.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tempovlm.core.request import STAGES
from tempovlm.data.registry import SCORED_TOGETHER
from tempovlm.lab import statistics

SCHEMA = "tempovlm.bench/1"

Run = Literal["budget", "fixed", "fresh"]
"""Kind of a request: at a budget, at the fixed setting, or the first of a new process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The record of one request.

    Attributes:
        budget_ms: None for the fixed setting.
        score: 0 to 1 by the data set's own rule; 0 for a failed request. For a caption, its share of the CIDEr
            of all of them, 0 to 10, or None if it was not scored with others.
        knobs: the setting that ran, such as `low/k4/b8`.
        slower_existed: whether a slower setting existed. policy: name of the policy that chose.
        error: reason of a failure; then there is no setting and no time.
    """

    run: Run
    dataset: str
    question_id: str
    image_id: str
    budget_ms: float | None
    prediction: str = ""
    score: float | None = 0.0
    knobs: str | None = None
    timings_ms: dict[str, float] = field(default_factory=dict)
    feasible: bool | None = None
    slower_existed: bool = False
    num_output_tokens: int = 0
    finish_reason: str | None = None
    policy: str | None = None
    error: str | None = None
    predicted_p50_ms: float | None = None
    predicted_upper_ms: float | None = None
    question: str = ""
    references: tuple[str, ...] = ()
    picture: str = ""

    @property
    def total_ms(self) -> float:
        """The measured total of a request that did not fail."""
        return self.timings_ms["total"]

    @property
    def on_time(self) -> bool:
        """Whether it was on time; a failed request was not."""
        return self.error is None and self.budget_ms is not None and self.total_ms <= self.budget_ms

    @property
    def is_caption(self) -> bool:
        """Whether its score is a share of that of all captions together."""
        return self.dataset in SCORED_TOGETHER

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain values."""
        return asdict(self)


def summarise(records: Sequence[Record]) -> dict[str, Any]:
    """Return the measured part of the result: a row for each budget, ascending, and the fixed setting's row."""
    budgets = sorted({r.budget_ms for r in records if r.budget_ms is not None})
    fixed = [r for r in records if r.run == "fixed"]
    failed = [r for r in records if r.error is not None]
    return {
        "budgets": [summarise_budget([r for r in records if r.budget_ms == b], b) for b in budgets],
        "fixed": summarise_fixed(fixed) if fixed else None,
        "num_failed": len(failed),
        "failures": [_failure(r) for r in failed[:20]],
    }


def summarise_budget(records: Sequence[Record], budget_ms: float) -> dict[str, Any]:
    """Return accuracy, share on time, latency quantiles and settings of the requests at one budget.

    Failed requests count as wrong and late; quantiles and settings are of the answered ones. First
    answers of fresh processes count only in the share on time, and are reported separately under `fresh`.
    """
    warm = [r for r in records if r.run == "budget"]
    fresh = [r for r in records if r.run == "fresh"]
    done = [r for r in warm if r.error is None]
    num_on_time = sum(r.on_time for r in records)
    row: dict[str, Any] = {
        "budget_ms": budget_ms,
        "num_samples": len(warm),
        "num_failed": len(warm) - len(done),
        **_accuracy(warm),
        **_cider(warm),
        "adherence": num_on_time / len(records),
        "adherence_wilson": list(statistics.wilson_interval(num_on_time, len(records))),
        "num_adherence": len(records),
        "utilisation": statistics.utilisation(
            [r.total_ms for r in done], [budget_ms] * len(done), [r.slower_existed for r in done]
        ),
        "num_utilisation": sum(r.slower_existed for r in done),
        **_latency(done),
        "knobs": statistics.shares(r.knobs for r in done if r.knobs),
        "feasible_share": statistics.mean(r.feasible is not False for r in done),
        "stages_ms": _stages(done),
    }
    if fresh:
        row["fresh"] = _fresh(fresh)
    return row


def summarise_fixed(records: Sequence[Record]) -> dict[str, Any]:
    """Return the fixed setting's row; its p99 / p50 shows how much of the spread is due to machine and data."""
    done = [r for r in records if r.error is None]
    latency = _latency(done)
    p50_ms, p99_ms = latency["p50_ms"], latency["p99_ms"]
    return {
        "knobs": done[0].knobs if done else None,
        "num_samples": len(records),
        "num_failed": len(records) - len(done),
        **_accuracy(records),
        **_cider(records),
        **latency,
        "p99_over_p50": p99_ms / p50_ms if p50_ms and p99_ms else None,
        "stages_ms": _stages(done),
    }


def _accuracy(records: Sequence[Record]) -> dict[str, Any]:
    """Return accuracy and interval of the answers that have a score of their own."""
    own = [(r.dataset, r.image_id, r.score) for r in records if not r.is_caption and r.score is not None]
    if not own:
        return {"accuracy": None, "accuracy_interval": None, "accuracy_by_dataset": {}}
    by_dataset = {
        name: statistics.mean(score for dataset, _, score in own if dataset == name)
        for name in sorted({dataset for dataset, _, _ in own})
    }
    scores, images = [score for _, _, score in own], [image for _, image, _ in own]
    return {
        "accuracy": statistics.mean(scores),
        "accuracy_interval": list(statistics.clustered_bootstrap(scores, images)),
        "accuracy_by_dataset": by_dataset,
    }


def _cider(records: Sequence[Record]) -> dict[str, Any]:
    """Return the CIDEr of all captions together, 0 to 10; nothing without captions.

    The interval is of the mean over resampled pictures, the weights of words as they are in all of them.
    """
    captions = [r for r in records if r.is_caption]
    scored = [(r.image_id, r.score) for r in captions if r.score is not None]
    if not captions:
        return {}
    if len(scored) < len(captions):
        return {"cider": None, "cider_interval": None}
    scores = [score for _, score in scored]
    interval = statistics.clustered_bootstrap(scores, [image for image, _ in scored])
    return {"cider": statistics.mean(scores), "cider_interval": list(interval)}


def _latency(records: Sequence[Record]) -> dict[str, float | None]:
    levels = {"p50_ms": 0.5, "p95_ms": 0.95, "p99_ms": 0.99}
    totals_ms = [r.total_ms for r in records]
    return {name: statistics.quantile(totals_ms, at) if totals_ms else None for name, at in levels.items()}


def _stages(records: Iterable[Record]) -> dict[str, float | None]:
    rows = list(records)
    return {stage: statistics.mean(r.timings_ms.get(stage, 0.0) for r in rows) for stage in STAGES}


def _fresh(records: Sequence[Record]) -> dict[str, Any]:
    done = [r.total_ms for r in records if r.error is None]
    return {
        "num_samples": len(records),
        "num_failed": len(records) - len(done),
        "adherence": sum(r.on_time for r in records) / len(records),
        "p50_ms": statistics.quantile(done, 0.5) if done else None,
        "max_ms": max(done, default=None),
    }


def _failure(record: Record) -> dict[str, Any]:
    return {
        "run": record.run,
        "question_id": record.question_id,
        "budget_ms": record.budget_ms,
        "error": record.error,
    }


def rounded(value: Any, digits: int = 4) -> Any:
    """Return the same structure with rounded floats, for readers and smaller files."""
    if isinstance(value, float):
        return round(value, digits)
    if isinstance(value, dict):
        return {name: rounded(item, digits) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    return value
