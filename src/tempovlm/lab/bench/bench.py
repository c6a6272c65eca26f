"""Run questions at several budgets through a loaded model, one at a time, and record the results.

Budgets, and a fixed reference setting, are interleaved for each question, so that a slow moment of the machine
affects all of them a little and none of them alone. The model is only used through `answer`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Protocol

from tempovlm.core.errors import PolicyError
from tempovlm.core.knobs import KnobConfig, KnobSpace
from tempovlm.core.request import Answer
from tempovlm.data.metrics.captions import cider
from tempovlm.data.registry import SCORED_TOGETHER
from tempovlm.data.sample import Sample
from tempovlm.data.scoring import score
from tempovlm.lab.bench.summary import Record, Run

_FRESH_TIMEOUT_S = 600

# Exceptions of a single bad sample: an unreadable file, a context that is too short, memory. Anything else is
# a fault of the program and stops the run.
_SAMPLE_ERRORS = (ArithmeticError, LookupError, OSError, RuntimeError, ValueError)


class Model(Protocol):
    """The part of a loaded model that a bench uses."""

    @property
    def space(self) -> KnobSpace:
        """Legal settings of the model."""

    def answer(
        self,
        image: Any,
        question: str,
        budget_ms: float | None = None,
        *,
        knobs: KnobConfig | None = None,
        max_new_tokens: int = 16,
        style: str = "vqa2",
        price_per_ms: float = 0.0,
    ) -> Answer:
        """Answer one question; a setting given as `knobs` runs without a choice."""


class Profile(Protocol):
    """Calibrated expected totals of the settings."""

    def p50_total_ms(self, index: int) -> float:
        """Return the median total of the setting with this index."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchPlan:
    """Requests to run on every sample.

    Attributes:
        budgets_ms: in any order; each is run once for each sample.
        fixed: the reference setting; None runs none.
        slower_existed: whether a setting slower than a given one exists.
        seed: seed of the order of the budgets.
        price_per_ms: expected accuracy that a millisecond must gain.
    """

    budgets_ms: tuple[float, ...]
    fixed: KnobConfig | None
    slower_existed: Callable[[KnobConfig], bool]
    max_new_tokens: int
    seed: int = 0
    price_per_ms: float = 0.0

    @property
    def runs_per_sample(self) -> int:
        """Number of requests for one sample."""
        return len(self.budgets_ms) + (self.fixed is not None)


def slower_than(space: KnobSpace, profile: Profile | None) -> Callable[[KnobConfig], bool]:
    """Return a check whether a setting has a slower one, by calibrated medians; else only `largest` has none."""
    if profile is None:
        return lambda knobs: knobs != space.largest
    slowest_ms = max(profile.p50_total_ms(i) for i in range(len(space)))
    return lambda knobs: profile.p50_total_ms(space.index(knobs)) < slowest_ms


def measure(model: Model, samples: Sequence[Sample], plan: BenchPlan) -> Iterator[Record]:
    """Answer every sample at every budget and at the fixed setting, in a random order for each sample.

    Yields:
        One record for each finished request, so that an interrupted caller keeps them.
    """
    for index, sample in enumerate(samples):
        jobs: list[float | None] = [*plan.budgets_ms]
        if plan.fixed is not None:
            jobs.append(None)
        Random(f"{plan.seed}/{index}").shuffle(jobs)
        for budget_ms in jobs:
            yield _answer(model, sample, plan, budget_ms)


def _answer(model: Model, sample: Sample, plan: BenchPlan, budget_ms: float | None) -> Record:
    run: Run = "fixed" if budget_ms is None else "budget"
    try:
        answer = model.answer(
            sample.image_path,
            sample.question,
            budget_ms,
            knobs=plan.fixed if budget_ms is None else None,
            max_new_tokens=plan.max_new_tokens,
            style=sample.style,
            price_per_ms=0.0 if budget_ms is None else plan.price_per_ms,
        )
    except PolicyError:
        raise
    except _SAMPLE_ERRORS as error:
        return _failed(run, sample, budget_ms, f"{type(error).__name__}: {error}")
    predicted = answer.predicted
    return Record(
        **_identity(run, sample, budget_ms),
        prediction=answer.text,
        score=_score(sample, answer.text),
        knobs=str(answer.knobs),
        timings_ms=dict(answer.timings_ms),
        feasible=answer.budget_feasible,
        slower_existed=plan.slower_existed(answer.knobs),
        num_output_tokens=answer.num_output_tokens,
        finish_reason=answer.finish_reason,
        policy=answer.policy,
        predicted_p50_ms=None if predicted is None else predicted.p50_ms,
        predicted_upper_ms=None if predicted is None else predicted.upper_ms,
    )


def measure_fresh(samples: Sequence[Sample], plan: BenchPlan, flags: Sequence[str]) -> Iterator[Record]:
    """Answer every sample at every budget, each in a new process: the first answer that a user waits for.

    Args:
        samples: few, because a process costs seconds.
        plan: its budgets.
        flags: flags with which the `answer` command loads the same model in the same way.
    """
    for sample in samples:
        for budget_ms in plan.budgets_ms:
            yield _fresh_answer(sample, budget_ms, plan, flags)


def _fresh_answer(sample: Sample, budget_ms: float, plan: BenchPlan, flags: Sequence[str]) -> Record:
    command = [sys.executable, "-m", "tempovlm", "answer", str(sample.image_path), sample.question]
    command += ["--budget_ms", repr(budget_ms), "--max_new_tokens", str(plan.max_new_tokens)]
    command += ["--style", sample.style, "--json", *flags]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_FRESH_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return _failed("fresh", sample, budget_ms, f"no answer within {_FRESH_TIMEOUT_S} s")
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return _failed("fresh", sample, budget_ms, lines[-1])
    answer = json.loads(done.stdout)
    knobs, predicted_ms = KnobConfig(**answer["knobs"]), answer["predicted_ms"] or {}
    return Record(
        **_identity("fresh", sample, budget_ms),
        prediction=answer["answer"],
        score=_score(sample, answer["answer"]),
        knobs=str(knobs),
        timings_ms=answer["timings_ms"],
        feasible=answer["budget_feasible"],
        slower_existed=plan.slower_existed(knobs),
        num_output_tokens=answer["num_output_tokens"],
        finish_reason=answer["finish_reason"],
        policy=answer["policy"],
        predicted_p50_ms=predicted_ms.get("p50"),
        predicted_upper_ms=predicted_ms.get("upper"),
    )


def errors_of(records: Iterable[Record]) -> list[str]:
    """Return one error line for each failed request."""
    return [f"{r.dataset} {r.question_id}: {r.error}" for r in records if r.error is not None]


def score_together(records: Sequence[Record], samples: Sequence[Sample]) -> list[Record]:
    """Return the records, each caption with its share of the CIDEr of all captions at its budget or fixed setting.

    A failed request counts as an empty caption. First answers of fresh processes are too few to be scored.

    Args:
        records: of all samples, or of those that an interrupted run finished.
        samples: the samples.
    """
    asked = {(s.dataset, str(s.question_id)): s for s in samples if s.dataset in SCORED_TOGETHER}
    groups: dict[tuple[str, str, float | None], list[int]] = {}
    for i, record in enumerate(records):
        if record.is_caption and record.run != "fresh":
            groups.setdefault((record.dataset, record.run, record.budget_ms), []).append(i)
    scored = list(records)
    for places in groups.values():
        if len(places) < 2:
            continue
        some = [records[i] for i in places]
        found = cider([r.prediction for r in some], [asked[r.dataset, r.question_id].answers for r in some])
        for i, value in zip(places, found, strict=True):
            scored[i] = replace(records[i], score=value)
    return scored


def _score(sample: Sample, prediction: str) -> float | None:
    """Return None for a caption, which is scored together with others."""
    return None if sample.dataset in SCORED_TOGETHER else score(sample, prediction)


def _identity(run: Run, sample: Sample, budget_ms: float | None) -> dict[str, Any]:
    return {
        "run": run,
        "dataset": sample.dataset,
        "question_id": str(sample.question_id),
        "image_id": f"{sample.dataset}/{sample.image_id}",
        "budget_ms": budget_ms,
        "question": sample.question,
        "references": sample.answers,
        "picture": str(sample.image_path),
    }


def _failed(run: Run, sample: Sample, budget_ms: float | None, error: str) -> Record:
    lost = None if sample.dataset in SCORED_TOGETHER else 0.0
    return Record(**_identity(run, sample, budget_ms), score=lost, error=" ".join(error.split()))
