"""What the first stage learns from: results, latencies and features that belong together, and labelled rows.

A label is the tier of the most accurate setting that fits a budget, question by question. Knows no network.
Shapes: `N` questions, `K` settings, `T` tiers, `R` rows, of which each is a question with a budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tempovlm.control.select import TIE, best
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobSpace
from tempovlm.core.progress import progress_bar
from tempovlm.engine.engine import Engine
from tempovlm.lab import features as material
from tempovlm.lab.core_exp.store import read_results
from tempovlm.lab.features import FeatureTable, Ints, Mask, Split
from tempovlm.lab.table import DecisionTable, Floats
from tempovlm.latency.estimator import load_estimator

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class Material:
    """Everything that controllers learn from: answers, latencies (N, K), features, and the split of questions.

    Attributes:
        weights: hash of the model's weights.
        stamp: of the measurements.
    """

    table: DecisionTable
    latency_ms: Floats
    features: FeatureTable
    split: Split
    weights: str
    stamp: Mapping[str, Any]

    @property
    def space(self) -> KnobSpace:
        """The settings."""
        return self.table.space

    @property
    def limits_ms(self) -> tuple[float, float]:
        """What budgets are feasible, by the questions of training."""
        return material.budget_range(self.latency_ms[self.split.train])


def load_material(
    engine: Engine,
    weights: str,
    results_dirs: Sequence[Path],
    datasets: Sequence[str],
    *,
    test_results_dirs: Sequence[Path] = (),
    latency_estimator_path: Path | None = None,
    train_split: float = 0.8,
    seed: int = 42,
    data_dir: Path | None = None,
) -> Material:
    """Read results, predict latencies, and look at every picture once, or take what is stored of it.

    Args:
        engine: with the model whose features are used.
        weights: hash of that model's weights.
        results_dirs: of the core experiment.
        datasets: which of its data sets.
        test_results_dirs: likewise, of questions about other pictures, all of which are for the test.
        latency_estimator_path: of Exp 1; measured medians of the settings unless told.
        train_split: share of the pictures to learn from.
        seed: of the split.
        data_dir: folder of the data sets.

    Raises:
        UserError: results, estimator or data set are missing, damaged, or do not belong together.
    """
    space, path = engine.space, latency_estimator_path
    estimator = None if path is None else load_estimator(path, space)
    frame = _read(results_dirs, datasets, space, weights)
    if estimator is None:
        material.check_device(frame)
    table = material.read_table(frame, space, datasets)
    split = material.split_images(table.image_id, train_split, seed)
    features = _features(engine, weights, results_dirs[0], table, data_dir)
    if test_results_dirs:
        more = material.read_table(_read(test_results_dirs, datasets, space, weights), space, datasets)
        table, split = material.with_test(table, split, more)
        features = features.with_more(_features(engine, weights, test_results_dirs[0], more, data_dir))
    latency_ms = material.setting_latency_ms(table, frame, estimator)
    first = (estimator.stamp if estimator else None) or next(filter(None, frame.attrs["stamps"].values()), {})
    return Material(table, latency_ms, features, split, weights, dict(first))


def _read(results_dirs: Sequence[Path], datasets: Sequence[str], space: KnobSpace, weights: str) -> pd.DataFrame:
    """The rows of results of these very weights."""
    frame = read_results(results_dirs, datasets, space)
    for name, stamp in frame.attrs["stamps"].items():
        if stamp and stamp["weights"] != weights:
            raise UserError(f"{name}: field weights is {stamp['weights']}, those of --model_path are {weights}")
    return frame


def _features(
    engine: Engine, weights: str, folder: Path, table: DecisionTable, data_dir: Path | None
) -> FeatureTable:
    """Of a table's questions, stored in a results directory."""
    samples = material.find_samples(table, data_dir)

    def extract() -> FeatureTable:
        with progress_bar(f"looking at the pictures of {len(samples)} questions") as advance:
            return material.extract_features(engine, samples, advance)

    return material.obtain_features(Path(folder), weights, samples, extract)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows to learn from.

    Attributes:
        question: (R,) places in the table. budget_ms: (R,).
        tier: (R,) index of the tier of the best setting.
        value: (R, T) accuracy of each tier at its usual best setting, see `tier_values`.
        share: (R, T) of the budget that this setting takes.
    """

    question: Ints
    budget_ms: Floats
    tier: Ints
    value: Floats
    share: Floats

    def __len__(self) -> int:
        return len(self.question)


def label(data: Material, question: Ints, budget_ms: Floats, time_price: float = 0.0) -> Rows:
    """The tier of the best setting of each question and budget, and what each tier has to offer."""
    latency_ms = data.latency_ms[question]
    setting = best(data.table.accuracy[question], latency_ms <= budget_ms[:, None], latency_ms, tie=TIE)
    tier = setting // (len(data.space) // len(data.space.tiers))
    return Rows(question, budget_ms, tier, *tier_values(data, question, budget_ms, time_price))


def tier_values(data: Material, question: Ints, budget_ms: Floats, time_price: float) -> tuple[Floats, Floats]:
    """Accuracy (R, T) of each question at each tier's best setting, and the share of the budget that this takes.

    Accuracy is 0, and the share 1, where no setting of the tier fits. Which setting of a tier is best is told by
    the mean over the questions of training, less the price of its time, so a question's own luck at one setting
    or another does not count, as it does in the label.
    """
    tiers = len(data.space.tiers)
    own, latency_ms = (
        x[question].reshape(len(question), tiers, -1) for x in (data.table.accuracy, data.latency_ms)
    )
    usual, budgets = (
        data.table.accuracy[data.split.train].mean(axis=0).reshape(tiers, -1),
        budget_ms[:, None, None],
    )
    fits = latency_ms <= budgets
    place = best(usual, fits, latency_ms, time_price / budgets)[..., None]
    accuracy, used = (
        np.where(fits.any(axis=2), np.take_along_axis(values, place, 2).squeeze(2), nothing)
        for values, nothing in ((own, 0.0), (latency_ms / budgets, 1.0))
    )
    return accuracy, used


def draw_rows(
    data: Material, part: Mask, per_question: int, rng: np.random.Generator, time_price: float = 0.0
) -> Rows:
    """Every question of a part with so many budgets, log-uniform over what is feasible."""
    question = np.repeat(np.flatnonzero(part), per_question)
    return label(data, question, material.draw_budgets(rng, len(question), data.limits_ms), time_price)
