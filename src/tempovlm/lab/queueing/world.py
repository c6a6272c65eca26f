"""Joins what a simulated server answers and how long that takes: questions with answers, pictures with times.

Answers are those of the judged questions (split `val`) at every setting. Times are those of the questions that
were timed, repeat by repeat: a request takes one of its own picture's repeats, the same one at every setting, so
that a slow moment is slow whatever is chosen. A question that was not timed takes the times of one that was, of
its data set and with as many crops if there is such a one.

Shapes: `N` questions, `K` settings, `P` timed questions, `R` repeats, `n` requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tempovlm.control.policies import prior_accuracy
from tempovlm.control.select import Ints
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KNOBS, KnobSpace
from tempovlm.lab.core_exp.store import read_results
from tempovlm.lab.queueing.arrivals import arrival_times_ms
from tempovlm.lab.table import Floats, Table, table_of

if TYPE_CHECKING:
    import pandas as pd

BOUND_LEVEL = 0.98
"""Share of a calibration's answers that stay under the upper bound."""


@dataclass(frozen=True, eq=False, slots=True)
class World:
    """Questions, their answers and their times.

    Attributes:
        judged: questions that are asked, with accuracies (N, K). train: those that policies learned from. laps_ms:
        (P, R, K) measured times. stands_for: for each question (N) those of the P whose times it may take.
        timed: data set, id and image features of each of the P.
    """

    judged: Table
    train: Table
    laps_ms: Floats
    stands_for: Sequence[Ints]
    timed: Sequence[tuple[str, str, int]] = ()

    @property
    def space(self) -> KnobSpace:
        """The settings."""
        return self.judged.space

    @property
    def bound_ms(self) -> Floats:
        """(K,) times under which 98 of 100 answers stay: what a calibration of these pictures finds."""
        return np.quantile(self.times_ms, BOUND_LEVEL, axis=0)

    @property
    def usual_ms(self) -> Floats:
        """(K,) medians."""
        return np.median(self.times_ms, axis=0)

    @property
    def times_ms(self) -> Floats:
        """(P * R, K) all measured times."""
        return self.laps_ms.reshape(-1, self.laps_ms.shape[2])

    @property
    def native(self) -> int:
        """The setting of the model as trained."""
        return self.space.index(self.space.native)

    @property
    def native_ms(self) -> float:
        """Mean time of an answer at it."""
        return float(self.times_ms[:, self.native].mean())


def read_world(
    results_dirs: Sequence[Path], space: KnobSpace, datasets: Sequence[str] | None = None, *, assumed: bool = False
) -> World:
    """Read answers, training answers and times from results of the core experiment.

    Args:
        results_dirs: folders of results.
        space: the settings.
        datasets: that are read; None reads all.
        assumed: whether answers count as right as often as a server assumes where none was measured.

    Raises:
        UserError: results cannot be read, a split is missing, or no question was timed at every setting.
    """
    frame = read_results(results_dirs, datasets, space)
    tables, splits = {}, (("val", "judged"), ("train", "training"))
    for split, what in splits[: 1 if assumed else 2]:
        if not (frame["split"] == split).any():
            raise UserError(f"--results_dir: no {what} questions (split {split}); add results that have them")
        tables[split] = table_of(frame, space, split)
    judged = _assumed(tables["val"]) if assumed else tables["val"]
    timed, laps_ms = _laps_of(frame, space)
    return World(judged, tables.get("train", judged), laps_ms, _stand_ins(judged, timed), timed)


def _assumed(table: Table) -> Table:
    """Return a table whose questions are all answered as well as is assumed without measuring."""
    accuracy = prior_accuracy(table.space)
    row = np.array([accuracy[knobs] for knobs in table.space])
    return replace(table, accuracy=np.tile(row, (len(table), 1)))


def _laps_of(frame: pd.DataFrame, space: KnobSpace) -> tuple[list[tuple[str, str, int]], Floats]:
    """Return data set, id and image features of each timed question, and its times (P, R, K)."""
    index = {knobs.values: i for i, knobs in enumerate(space)}
    rows = frame[frame["T_total"].notna() & frame["repeats"].notna()]
    found: dict[tuple[str, str], dict[int, tuple[float, ...]]] = {}
    features: dict[tuple[str, str], int] = {}
    names = ("dataset", "question_id", "repeats", "vision_tokens", *KNOBS)
    for dataset, question, repeats, tokens, *setting in zip(*(rows[name] for name in names), strict=True):
        place = index.get(tuple(setting))
        if place is not None:
            found.setdefault((dataset, question), {})[place] = repeats["T_total"]
            features[dataset, question] = max(int(tokens), features.get((dataset, question), 0))
    whole = {key: laps for key, laps in found.items() if len(laps) == len(space)}
    if not whole:
        raise UserError(f"--results_dir: no question was timed at all {len(space)} settings; add timed results")
    count = min(len(lap) for laps in whole.values() for lap in laps.values())
    stacked = np.array([[laps[k][:count] for k in range(len(space))] for laps in whole.values()])
    return [(*key, features[key]) for key in whole], stacked.transpose(0, 2, 1)


def _stand_ins(judged: Table, timed: Sequence[tuple[str, str, int]]) -> list[Ints]:
    """Return for each judged question the places of the timed ones whose times it takes."""
    names = np.array([key[0] for key in timed])
    tokens = np.array([key[2] for key in timed])
    places = {key[:2]: i for i, key in enumerate(timed)}
    result = []
    for key, features in zip(judged.questions, judged.vision_tokens.max(axis=1), strict=True):
        if key in places:
            result.append(np.array([places[key]]))
            continue
        same_set, same_size = names == key[0], tokens == features
        masks = (same_set & same_size, same_size, same_set, np.ones(len(timed), dtype=bool))
        result.append(np.flatnonzero(next(mask for mask in masks if mask.any())))
    return result


def about_training(world: World, part: str = "") -> World:
    """Return the same world whose requests are about training questions, of one of their parts if it is named."""
    own = world.train.take(world.train.rows(part)) if part else world.train
    return World(own, world.train, world.laps_ms, _stand_ins(own, world.timed), world.timed)


@dataclass(frozen=True, eq=False, slots=True)
class Traffic:
    """Requests in the order in which they come.

    Attributes:
        arrival_ms: (n,). budget_ms: (n,) from there to the deadline. question: (n,) rows of the judged questions.
        service_ms: (n, K) what each setting would take.
    """

    arrival_ms: Floats
    budget_ms: Floats
    question: Ints
    service_ms: Floats

    def __len__(self) -> int:
        return len(self.arrival_ms)


def draw_traffic(
    world: World, gaps: Floats, load: float, budgets_ms: Sequence[float], seed: int, lanes: int = 1
) -> Traffic:
    """Draw questions, budgets and times for arrivals; the same ones at every load.

    Args:
        world: questions and times.
        gaps: (n,) between arrivals, with a mean of 1.
        load: of the lanes.
        budgets_ms: of which each request has one, all equally often.
        seed: of what is drawn.
        lanes: that answer at once.
    """
    rng, count = np.random.default_rng((seed, 2)), len(gaps)
    order = [rng.permutation(len(world.judged)) for _ in range(-(-count // len(world.judged)))]
    question = np.concatenate(order)[:count]
    picture = np.array([rng.choice(world.stands_for[row]) for row in question])
    lap = rng.integers(world.laps_ms.shape[1], size=count)
    budget_ms = rng.choice(np.asarray(budgets_ms, dtype=float), size=count)
    arrival_ms = arrival_times_ms(gaps, load, world.native_ms, lanes)
    return Traffic(arrival_ms, budget_ms, question, world.laps_ms[picture, lap])
