"""Plan of a core experiment: questions, settings, repeats. Imports no torch and no NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KNOBS, KnobConfig, KnobSpace
from tempovlm.core.records import Key
from tempovlm.core.request import Request
from tempovlm.data.sample import Sample
from tempovlm.lab.script import flag
from tempovlm.lab.script import seed as read_seed

CPU_BATCH, GPU_BATCH = 32, 128
"""Questions answered together: on a GPU starting the kernels takes as long for few as for many."""


@dataclass(frozen=True, slots=True)
class Job:
    """A question with its cap on generated tokens, the end token included."""

    sample: Sample
    max_new_tokens: int

    @property
    def request(self) -> Request:
        """Return the request for a greedy answer."""
        sample = self.sample
        return Request(
            images=(sample.image_path,),
            question=sample.question,
            style=sample.style,
            max_new_tokens=self.max_new_tokens,
        )


def row_key(job: Job, knobs: KnobConfig) -> Key:
    """Return the key of a question's row at a setting within its data set."""
    return str(job.sample.question_id), *knobs.values


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """Settings, repeats and seeds of one sweep.

    Attributes:
        settings: the settings to run.
        batch_size: questions answered together for accuracy; 0 answers only the timed questions, and None leaves
            it to the device.
        latency_samples: number of timed questions of each data set, on as many pictures; 0 times none.
        repeats: passes over the timed questions. warmup: discarded answers at each setting before a
            question is first timed, in a resumed run too, because its process has not warmed up.
        max_new_tokens: caps on generated tokens, given to the questions in turn.
        seed: seed of the order in which questions and settings are timed.
        twins: ask about each picture's twin, the same scene with other noise and a small shift.
    """

    settings: tuple[KnobConfig, ...]
    batch_size: int | None = flag(
        None, f"questions answered together for accuracy; default: {GPU_BATCH} on a GPU, else {CPU_BATCH}"
    )
    latency_samples: int = flag(0, "questions of each data set that are timed at batch 1")
    repeats: int = flag(5, "passes that time each of them once at each setting")
    warmup: int = flag(1, "untimed answers before a question's first pass in each run")
    max_new_tokens: tuple[int, ...] = flag((16,), "most tokens of an answer, given to the questions in turn")
    seed: int = flag(42, "seed of the choice of questions and of the order of timing", read=read_seed)
    twins: bool = flag(False, "ask about the pictures' twins, for the twin pick of tempovlm evaluate")

    def __post_init__(self) -> None:
        least = (("latency_samples", 0), ("warmup", 0), ("repeats", 1))
        values = [(name, getattr(self, name), floor) for name, floor in least]
        values += [("max_new_tokens", cap, 1) for cap in self.max_new_tokens]
        for name, value, floor in values:
            if value < floor:
                raise UserError(f"--{name} {value}: must be at least {floor}")

    def jobs(self, samples: Sequence[Sample]) -> list[Job]:
        """Return each question with its cap, which depends on its index, not on how many there are."""
        caps = self.max_new_tokens
        return [Job(sample, caps[i % len(caps)]) for i, sample in enumerate(samples)]

    def batch_on(self, device: str) -> int:
        """Return how many questions are answered together on a type of device."""
        if self.batch_size is None:
            return GPU_BATCH if device == "cuda" else CPU_BATCH
        return self.batch_size

    def conditions(self, split: str) -> dict[str, Any]:
        """Return the conditions that a resumed sweep must share."""
        caps = list(self.max_new_tokens)
        return {"split": split, "seed": self.seed, "max_new_tokens": caps, "twins": self.twins}

    def latency_jobs(self, samples: Sequence[Sample]) -> list[Job]:
        """Return the first questions on different pictures, then others if there are too few pictures."""
        first: list[Job] = []
        others: list[Job] = []
        seen: set[str] = set()
        for job in self.jobs(samples):
            (others if job.sample.image_id in seen else first).append(job)
            seen.add(job.sample.image_id)
        return (first + others)[: self.latency_samples]


def choose_settings(space: KnobSpace, *legal: Sequence[str | int] | None) -> tuple[KnobConfig, ...]:
    """Select the settings of a space with these values of each knob, in the order of `KNOBS`; None takes all.

    Raises:
        UserError: a value is not legal for the model.
    """
    return space.subset({name: some for name, some in zip(KNOBS, legal, strict=False) if some}).settings


def draw_samples(
    datasets: Sequence[str], split: str, data_dir: Path | None, num_samples: int, seed: int, twins: bool = False
) -> tuple[dict[str, list[Sample]], str]:
    """Draw the questions of each data set, and name the source of their data.

    With `twins` they are asked about the twins of their pictures.

    Raises:
        UserError: a data set is missing, or a picture has no twin.
    """
    # Threads are set before NumPy is imported, which the readers of data sets need.
    from tempovlm.data.catalog import load_samples

    drawn = {
        name: load_samples(name, split, data_dir=data_dir, num_samples=num_samples, seed=seed) for name in datasets
    }
    drawn = {name: [_twin(sample) for sample in samples] for name, samples in drawn.items()} if twins else drawn
    return drawn, ", ".join(sorted({sample.data_source for some in drawn.values() for sample in some}))


def _twin(sample: Sample) -> Sample:
    """Return the same question about the twin of its picture."""
    if sample.twin_path is None:
        raise UserError(
            f"--twins: {sample.image_path} of {sample.dataset} has no twin; generated validation sets do"
        )
    return replace(sample, image_path=sample.twin_path)
