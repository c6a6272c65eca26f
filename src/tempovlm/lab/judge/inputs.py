"""From results directories to what the judge needs: tables, latencies, what questions say, rules by name.

Latencies that policies go by are upper values, as the guard's are; those that they are charged are what was
measured on the question, else a prediction, else the setting's median, and the report says which. Loads no model.

Shapes: `N` questions, `K` settings, `T` tiers, `F` features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tempovlm.control.baselines import LinUCB, NearestNeighbours, question_features, varying
from tempovlm.control.policy import Question, Sight
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KNOBS, KnobSpace
from tempovlm.core.request import Request
from tempovlm.data.catalog import load_samples
from tempovlm.data.sample import Sample
from tempovlm.lab.core_exp.questions import check_samples
from tempovlm.lab.core_exp.store import read_results
from tempovlm.lab.judge import offline
from tempovlm.lab.judge.offline import Floats, Rule, StaticMixture
from tempovlm.lab.table import DecisionTable, decision_table
from tempovlm.latency.estimator import Estimator

if TYPE_CHECKING:
    import pandas as pd

    from tempovlm.engine.runner import Runner

_ONLY = tuple(f"only_{knob}" for knob in KNOBS)
BASELINES = ("table", "fixed", "best_static", *_ONLY, "random", "knn", "linucb", "oracle")
"""Names that `--policies` takes beside paths of checkpoints."""

LOOKING = ("knn", "linucb")
"""Those that look at the question."""

_BEFORE_COMPUTE = ("T_preprocess", "T_vision_encoder", "T_projector")


@dataclass(frozen=True, slots=True)
class Part:
    """The questions of one split.

    Attributes:
        prepare_ms: (T,) median measured time of preparing the picture at each tier, which estimators leave out;
            zeros where nothing was measured. looking_ms: (T,) that and encoding it.
        stamp: of the first file with measured times, else of the first file; empty where files have none.
    """

    table: DecisionTable
    prepare_ms: Floats
    looking_ms: Floats
    stamp: Mapping[str, Any] = field(default_factory=dict)


def read_part(dirs: Sequence[Path], space: KnobSpace, split: str, datasets: Sequence[str] | None) -> Part:
    """A split of some results directories.

    Raises:
        UserError: they cannot be read, or have no such questions.
    """
    frame = read_results(dirs, datasets, space)
    table = decision_table(frame, space, split, datasets)
    prepare_ms, looking_ms = (_medians(frame, space, names) for names in (_BEFORE_COMPUTE[:1], _BEFORE_COMPUTE))
    return Part(table, prepare_ms, looking_ms, _stamp(frame))


def _stamp(frame: pd.DataFrame) -> Mapping[str, Any]:
    """The stamp that the times belong to."""
    timed = set(frame.loc[frame["T_total"].notna(), "source"])
    stamps = frame.attrs["stamps"]
    first = [stamp for path, stamp in stamps.items() if str(Path(path).parent) in timed and stamp is not None]
    return next(iter(first), frame.attrs["stamp"]) or {}


def _medians(frame: pd.DataFrame, space: KnobSpace, names: Sequence[str]) -> Floats:
    """(T,) median of a sum of stages by tier; zero where it was not measured."""
    totals = frame[list(names)].astype(float).sum(axis=1, min_count=1).groupby(frame["tier"]).median()
    return np.nan_to_num(totals.reindex(list(space.tiers)).to_numpy(dtype=float))


@dataclass(frozen=True, slots=True)
class Latencies:
    """Of one table: `decided_ms` (N, K) to go by, `scored_ms` (N, K) to be charged, and where both come from."""

    decided_ms: Floats
    scored_ms: Floats
    decided_by: str
    scored_by: str


def latencies(part: Part, measured: Part, estimator: Estimator | None, level: float) -> Latencies:
    """Latencies of a table.

    Args:
        part: whose questions.
        measured: training questions, whose measured times stand in for all questions without an estimator.
        estimator: None where there is none.
        level: quantile that policies go by.

    Raises:
        UserError: there is no estimator and a setting was never measured.
    """
    table = part.table
    shape = table.accuracy.shape
    is_whole = not np.isnan(table.latency_ms).any()
    if estimator is None:
        source = next((one for one in (measured.table, table) if _covers(one)), measured.table)
        medians_ms = source.median_ms()
        decided_ms = np.broadcast_to(np.nanquantile(source.latency_ms, level, axis=0), shape)
        decided_by = f"P{100 * level:g} of the setting over measured {source.split} questions"
        scored_ms, scored_by = np.broadcast_to(medians_ms, shape), "median of the setting over measured questions"
    else:
        per_tier = shape[1] // len(table.space.tiers)
        prepare_ms = np.repeat(part.prepare_ms if part.prepare_ms.any() else measured.prepare_ms, per_tier)
        decided_ms = table.predicted_ms(estimator, level) + prepare_ms
        decided_by = f"P{100 * level:g} of the latency estimator ({estimator.name}) and preparing the picture"
        scored_ms = table.predicted_ms(estimator) + prepare_ms
        scored_by = f"median of the latency estimator ({estimator.name}) and preparing the picture"
    if is_whole:
        scored_ms, scored_by = table.latency_ms, "measured on each question at each setting"
    return Latencies(np.array(decided_ms), np.array(scored_ms), decided_by, scored_by)


def _covers(table: DecisionTable) -> bool:
    """Whether every setting was measured on some question."""
    return bool((~np.isnan(table.latency_ms)).any(axis=0).all())


def static_mixture(train: Part, latencies: Latencies, dataset: str | None = None) -> StaticMixture:
    """The best mixture of static settings on the training questions, or on those of one data set."""
    every = train.table.dataset
    rows = np.ones(len(every), dtype=bool) if dataset is None else every == dataset
    return StaticMixture.fit(
        train.table.accuracy[rows].mean(axis=0),
        np.median(latencies.scored_ms[rows], axis=0),
        latencies.decided_ms[rows].mean(axis=0),
    )


@dataclass(frozen=True)
class Content:
    """What the questions say and show: samples by data set and question id."""

    samples: Mapping[tuple[str, str], Sample]
    _sizes: dict[Path, tuple[int, int]] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, tables: Sequence[DecisionTable], data_dir: Path | None) -> Content:
        """The samples of some tables' questions.

        Raises:
            UserError: the data folder has other questions.
        """
        samples: dict[tuple[str, str], Sample] = {}
        for table in tables:
            for dataset in sorted(set(table.dataset.tolist())):
                for sample in load_samples(dataset, table.split, data_dir=data_dir):
                    samples[dataset, sample.question_id] = sample
            for dataset, question in offline.keys(table):
                if (dataset, question) not in samples:
                    raise UserError(
                        f"--data_dir: question {question} of {dataset} is in the results but not in the data; "
                        "name the folder that the core experiment read (the repository's results: `tempovlm data "
                        "make --output_dir DIR` draws it)"
                    )
            check_samples(table.folders, table.split, [samples[key] for key in offline.keys(table)])
        return cls(samples)

    def of(self, table: DecisionTable, row: int) -> Sample:
        """The sample of a row."""
        return self.samples[str(table.dataset[row]), str(table.question_id[row])]

    def question_of(self, table: DecisionTable, row: int) -> Question:
        """A row's text, prompt style and picture size."""
        sample = self.of(table, row)
        return Question(text=sample.question, image_size=self._size(sample.image_path), style=sample.style)

    def features_of(self, table: DecisionTable) -> Floats:
        """(N, F) what the baselines look at."""
        asked = [self.question_of(table, row) for row in range(len(table))]
        return np.stack([question_features(one.text, one.image_size) for one in asked])

    def _size(self, path: Path) -> tuple[int, int]:
        if path not in self._sizes:
            from PIL import Image

            with Image.open(path) as image:
                self._sizes[path] = (image.height, image.width)
        return self._sizes[path]


@dataclass(frozen=True)
class Sights:
    """Encoded pictures of questions, each picture encoded once a tier, by the stages that serve requests."""

    runner: Runner
    content: Content
    _known: dict[tuple[Path, str], Any] = field(default_factory=dict, repr=False)

    def __call__(self, table: DecisionTable, row: int, tier: str) -> Sight:
        """What a policy sees of a row at a tier."""
        sample, run = self.content.of(table, row), self.runner
        key = (sample.image_path, tier)
        if key not in self._known:
            request = Request(images=(sample.image_path,), question=sample.question, style=sample.style)
            crops = run.prepare(run.open(request), tier, request).crops
            self._known[key] = run.project(run.encode(crops), crops)
        place = table.space.tiers.index(tier)
        return Sight(tier, self._known[key], int(table.vision_tokens[row, place]), int(table.text_tokens[row]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What the baselines are made from: the training questions, and the judged ones' content where needed."""

    train: Part
    train_latencies: Latencies
    level: float
    content: Callable[[], Content]
    oracle: Rule
    seed: int = 0
    time_price: float = 0.0
    price_per_ms: float = 0.0
    _fitted: dict[str, NearestNeighbours | LinUCB] = field(default_factory=dict)

    def rule(self, name: str) -> Rule:
        """The baseline of a name.

        Raises:
            UserError: there is none.
        """
        space, accuracy = self.train.table.space, self.train.table.accuracy.mean(axis=0)
        prices = (self.time_price, self.price_per_ms)
        if name == "table":
            return offline.table_rule(accuracy, *prices)
        if name == "fixed":
            return offline.Static(space.index(space.native))
        if name == "best_static":
            return offline.BestStatic(accuracy, np.quantile(self.train_latencies.decided_ms, self.level, axis=0))
        if name == "random":
            return offline.random_rule(self.seed)
        if name == "oracle":
            return self.oracle
        if name in _ONLY:
            return offline.table_rule(accuracy, *prices, varying(space, (name.removeprefix("only_"),)))
        if name not in LOOKING:
            raise UserError(
                f"--policies {name}: no such baseline and no such file; choose from {', '.join(BASELINES)}, or "
                "give the path of a controller checkpoint"
            )
        scorer, content = self.scorer(name), self.content()
        scores_of: offline.ScoresOf = lambda table: scorer.scores(content.features_of(table))  # noqa: E731
        return offline.Scored(scores_of, time_price=prices[0], price_per_ms=prices[1])

    def scorer(self, name: str) -> NearestNeighbours | LinUCB:
        """One of `LOOKING`, fitted to the training questions once."""
        if name not in self._fitted:
            table, decided_ms = self.train.table, self.train_latencies.decided_ms
            features = self.content().features_of(table)
            self._fitted[name] = (
                NearestNeighbours.fit(features, table.accuracy, table.image_id.tolist())
                if name == "knn"
                else LinUCB.fit(table.space, features, table.accuracy, decided_ms, seed=self.seed)
            )
        return self._fitted[name]

    def save(self, folder: Path, names: Sequence[str], weights: str | None) -> list[Path]:
        """Write those of the named policies that were fitted here as checkpoints that can be served.

        Args:
            folder: where `NAME.pt` goes.
            names: of policies.
            weights: hash of the model whose answers they learned from.

        Raises:
            UserError: the folder cannot be written.
        """
        from tempovlm.control.checkpoint import save_controller

        paths = []
        for name in names:
            if name in LOOKING:
                paths.append(folder / f"{name}.pt")
                save_controller(
                    paths[-1],
                    kind="nearest_neighbours" if name == "knn" else name,
                    networks={"scorer": self.scorer(name)},
                    space=self.train.table.space,
                    weights=weights,
                    stamp=self.train.stamp,
                    options={"policy": name, "seed": self.seed, "questions": len(self.train.table)},
                )
        return paths
