"""How much of everything the chain of the eight experiments takes, and what a step of it is.

Counts and rates are in one table each; they are chosen so that the chain takes less than half an hour on two
cores. Values only: which steps there are is in `reproduction_steps`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

TAKE = "take"
"""Command of a step that takes rows of shipped results instead of running a script."""

SWEEPS = {"train": "core_exp_pocket_train", "val": "core_exp_pocket_val", "twin": "core_exp_pocket_twin"}
"""Accuracies of the core experiment, under the repository's `results`."""

RATES_MS = {
    "picture drawn": 5,
    "plan of a question": 40,
    "question at all settings": 2600,
    "question read": 8,
    "timed answer": 95,
    "picture looked at": 170,
    "answer within a budget": 110,
    "epoch": 300,
    "calibration": 60_000,
    "boosting": 45_000,
    "statistics": 90_000,
}
"""What a unit of work takes on two cores with the pocket, roughly: for the time left, which corrects itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How much of everything, of each of the four data sets where nothing else is said.

    Attributes:
        train_pictures, val_pictures: drawn. train, val: questions whose accuracy at every setting counts.
        importance, joint: questions of Exp 6 of each split, and in its joint search.
        timed, repeats: questions that are timed at every setting, and how often.
        requests: of Exp 8 in all, at every budget. seeds: of Exp 5. max_new_tokens: of an answer.
        epochs: of every training; None takes the experiment protocol's. budgets: drawn in Exp 2.
        draws: bootstrap resamples. shuffles: permutations of the shuffled control.
    """

    train_pictures: int
    val_pictures: int
    train: int
    val: int
    importance: int
    joint: int
    timed: int
    repeats: int
    requests: int
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    max_new_tokens: int = 16
    epochs: int | None = None
    budgets: int = 20_000
    draws: int = 2000
    shuffles: int = 3


SHIPPED = Counts(
    train_pictures=2000,
    val_pictures=500,
    train=240,
    val=120,
    importance=16,
    joint=8,
    timed=5,
    repeats=3,
    requests=200,
)
"""With accuracies that the repository ships."""

ANEW = replace(SHIPPED, train_pictures=64, val_pictures=64, train=24, val=12, importance=12, joint=6)
"""With everything measured."""

SMOKE = Counts(
    train_pictures=2,
    val_pictures=2,
    train=2,
    val=2,
    importance=1,
    joint=1,
    timed=1,
    repeats=1,
    requests=4,
    seeds=(0, 1),
    max_new_tokens=2,
    epochs=2,
    budgets=100,
    draws=20,
    shuffles=0,
)
"""To see every step run; its figures mean nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A part of the chain.

    Attributes:
        name: of its log. title: for people. counts: on how much it rests, for people.
        command: a script's path in the repository, a subcommand of `tempovlm`, or `TAKE`. words: its flags.
        results: files that are there when it is done, from the run's folder.
        about_ms: what it takes, roughly.
    """

    name: str
    title: str
    counts: str
    command: str
    words: tuple[str, ...]
    results: tuple[str, ...]
    about_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is run on what.

    Attributes:
        model: pocket, a folder or a hub id. weights: hash of its weights. device: cpu or cuda.
        place: the machine's name in paths of results.
        data_dir: of the data sets; None draws a test bed. has_shipped: whether accuracies are taken from there.
        questions: digest of those that `data_dir` has for the run; None where a test bed is drawn.
    """

    model: str
    weights: str
    device: str
    place: str
    counts: Counts
    data_dir: Path | None
    has_shipped: bool
    questions: str | None = None

    @property
    def data(self) -> str:
        """Folder of the data, from the run's folder."""
        return "data" if self.data_dir is None else str(self.data_dir)

    def conditions(self) -> dict[str, Any]:
        """What must not change when a run is resumed."""
        fields = asdict(self) | {"data_dir": self.data}
        return json.loads(json.dumps(fields))
