"""Material for the controllers: budgets, the best setting for each, a split by picture, and features.

A label is the most accurate setting that fits a budget; settings that are equally accurate within a tie count as
equal, and the cheapest of them is the label. Budgets are drawn log-uniformly over what is feasible, so that short
ones are not rare. A picture's features are made once for each tier and kept in a file, so that training never runs
the model. Shapes: `N` questions, `K` settings, `T` tiers, `L` and `V` widths of features, `D` width of a token.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tempovlm.control.observation import (
    glance_feature,
    language_feature,
    question_ids,
    token_vectors,
    vision_feature,
    vision_width,
)
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobSpace
from tempovlm.core.paths import whole
from tempovlm.core.progress import Advance, silent
from tempovlm.core.request import Request
from tempovlm.data.catalog import load_samples
from tempovlm.data.digest import question_digests
from tempovlm.data.sample import Sample
from tempovlm.engine.batching import encode_all
from tempovlm.engine.engine import Engine
from tempovlm.lab.core_exp.batched import SAMPLE_ERRORS
from tempovlm.lab.core_exp.questions import check_samples
from tempovlm.lab.table import DecisionTable, Floats, decision_table
from tempovlm.latency.estimator import Estimator

if TYPE_CHECKING:
    import pandas as pd

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
Features32 = NDArray[np.float32]

PICTURES_AT_ONCE = 16

_CACHE = ".features"
"""Folder of stored features within a results directory."""

_TABLES = ("language", "glance", "vision")

_log = logging.getLogger("tempovlm")


_SAME = ("hardware", "device", "threads")
"""Fields of the stamps of timed results that must agree."""


class Split(NamedTuple):
    """Questions (N,) to learn from, to choose an epoch by, and to report on."""

    train: Mask
    validation: Mask
    test: Mask


@dataclass(frozen=True, eq=False, slots=True)
class FeatureTable:
    """What the networks see, by question: language (N, L), glance (N, V) and, by tier, vision (N, T, V)."""

    language: Features32
    glance: Features32
    vision: Features32

    def __len__(self) -> int:
        return len(self.language)

    def take(self, rows: Ints | Mask) -> FeatureTable:
        """Some of the questions."""
        return FeatureTable(self.language[rows], self.glance[rows], self.vision[rows])

    def with_more(self, more: FeatureTable) -> FeatureTable:
        """These questions and then others."""
        return FeatureTable(*(np.concatenate([getattr(one, name) for one in (self, more)]) for name in _TABLES))


def read_table(frame: pd.DataFrame, space: KnobSpace, datasets: Sequence[str]) -> DecisionTable:
    """The training questions of what `store.read_results` returned; the others where there are none."""
    split = "train" if (frame["split"] == "train").any() else str(frame["split"].iloc[0])
    return decision_table(frame, space, split, datasets)


def check_device(frame: pd.DataFrame) -> None:
    """Raise a `UserError` unless the rows with latencies are of one machine."""
    timed = set(frame[frame["T_total"].notna()]["source"])
    stamps = [stamp for path, stamp in frame.attrs["stamps"].items() if stamp and str(Path(path).parent) in timed]
    for name in _SAME:
        found = sorted({str(stamp[name]) for stamp in stamps})
        if len(found) > 1:
            raise UserError(
                f"--results_dir: field {name} of the timed results differs ({', '.join(found)}); give those of "
                "one machine, or --latency_estimator_path"
            )


def median_latency_ms(frame: pd.DataFrame, space: KnobSpace) -> Floats:
    """(K,) median measured total of each setting, over whatever questions were timed.

    Raises:
        UserError: a setting was never timed.
    """
    timed = frame[frame["T_total"].notna()]
    medians = timed.groupby(["tier", "top_k", "num_blocks"])["T_total"].median().to_dict()
    values = [medians.get((k.tier, k.top_k, k.num_blocks), np.nan) for k in space]
    if np.isnan(values).any():
        missing = space.settings[int(np.argmax(np.isnan(values)))]
        raise UserError(
            f"--results_dir: no measured latency (field T_total) at {missing}; add a results directory that has "
            "it, or give --latency_estimator_path"
        )
    return np.array(values)


def setting_latency_ms(table: DecisionTable, frame: pd.DataFrame, estimator: Estimator | None = None) -> Floats:
    """(N, K) total of each question at each setting: predicted, else the settings' measured medians.

    An estimator knows nothing of opening a picture and cutting its crops, so that is added at each tier, where
    results were timed on the estimator's device: the median of what these questions' totals have beyond the
    prediction, or, where other questions were timed, the median of their preprocessing.
    """
    if estimator is None:
        return np.tile(median_latency_ms(frame, table.space), (len(table), 1))
    predicted_ms = table.predicted_ms(estimator)
    extra = preprocess_ms(frame, table.space, estimator.stamp)
    known = [stamp for stamp in table.stamps.values() if stamp]
    if all(_same_device(stamp, estimator.stamp) for stamp in known):
        beyond = (table.latency_ms - predicted_ms).reshape(len(table), len(extra), -1)
        for t in range(len(extra)):
            if np.isfinite(beyond[:, t]).any():
                extra[t] = max(float(np.nanmedian(beyond[:, t])), 0.0)
    return predicted_ms + np.repeat(extra, len(table.space) // len(extra))


def _same_device(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one.get(name) == other.get(name) for name in ("hardware", "device"))


def preprocess_ms(frame: pd.DataFrame, space: KnobSpace, stamp: Mapping[str, Any]) -> Floats:
    """(T,) median time of preparing a picture at each tier on a stamp's device; 0 where it was not timed there."""
    stamps = frame.attrs.get("stamps", {}).items()
    same = {str(Path(path).parent) for path, own in stamps if own and _same_device(own, stamp)}
    if not same:
        return np.zeros(len(space.tiers))
    timed = frame[frame["T_preprocess"].notna() & frame["source"].isin(same)]
    medians = timed.groupby("tier")["T_preprocess"].median().to_dict()
    return np.array([float(medians.get(tier, 0.0)) for tier in space.tiers])


def budget_range(latency_ms: Floats) -> tuple[float, float]:
    """From the median cost of the cheapest setting to that of the dearest; times (N, K) or (K,)."""
    rows = np.atleast_2d(latency_ms)
    return float(np.median(rows.min(axis=1))), float(np.median(rows.max(axis=1)))


def draw_budgets(rng: np.random.Generator, count: int, limits_ms: tuple[float, float]) -> Floats:
    """(count,) budgets in milliseconds, log-uniform between the limits."""
    low, high = np.log(limits_ms)
    return np.exp(rng.uniform(low, high, count))


def split_images(image_id: NDArray[np.str_], train_split: float = 0.8, seed: int = 42) -> Split:
    """Split by picture: `train_split` of them to learn from, the others in halves.

    Raises:
        UserError: fewer than three pictures, or a share that is none.
    """
    if not 0 < train_split < 1:
        raise UserError(f"--train_split {train_split}: must be between 0 and 1")
    names = np.unique(image_id)
    if len(names) < 3:
        raise UserError(f"--results_dir: {len(names)} pictures; a split by picture needs 3")
    np.random.default_rng(seed).shuffle(names)
    count = min(max(round(train_split * len(names)), 1), len(names) - 2)
    middle = count + (len(names) - count + 1) // 2
    parts = (names[:count], names[count:middle], names[middle:])
    return Split(*(np.isin(image_id, part) for part in parts))


def with_test(table: DecisionTable, split: Split, more: DecisionTable) -> tuple[DecisionTable, Split]:
    """Put more questions behind those that were split, all of them into the test part.

    What preparing a picture takes, where latencies are predicted, is still told by the first questions alone, so
    that nothing that is learned depends on the test.

    Raises:
        UserError: a picture is among those that were split.
    """
    if shared := sorted(set(table.image_id) & set(more.image_id)):
        raise UserError(
            f"--test_results_dir: picture {shared[0]} is in --results_dir too ({len(shared)} are); give questions "
            "about other pictures"
        )
    parts = {
        name: np.concatenate([part, np.full(len(more), name == "test")]) for name, part in split._asdict().items()
    }
    return table.with_untimed(more), Split(**parts)


def find_samples(table: DecisionTable, data_dir: Path | None = None) -> list[Sample]:
    """The questions of a table with their pictures, in its order.

    Raises:
        UserError: a data set is not there, lacks one of the questions, or has another of its id.
    """
    known: dict[tuple[str, str], Sample] = {}
    for name in dict.fromkeys(table.dataset.tolist()):
        samples = load_samples(name, table.split, data_dir=data_dir)
        known |= {(name, str(sample.question_id)): sample for sample in samples}
    keys = list(zip(table.dataset.tolist(), table.question_id.tolist(), strict=True))
    lost = [key for key in keys if key not in known]
    if lost:
        raise UserError(
            f"--data_dir: {lost[0][0]} ({table.split}) has no question {lost[0][1]}, which the results are about "
            f"({len(lost)} of {len(keys)} are missing); give the folder of the measured data"
        )
    found = [known[key] for key in keys]
    check_samples(table.folders, table.split, found)
    return found


def extract_features(engine: Engine, samples: Sequence[Sample], advance: Advance = silent) -> FeatureTable:
    """Run every picture once at each tier; a picture that cannot be read has zeros."""
    model, tokenizer = engine.runner.model, engine.runner.tokenizer
    ids = [question_ids(tokenizer, sample.question) for sample in samples]
    vectors = token_vectors(model)
    language = np.stack([language_feature(vectors, one) for one in ids])
    width, tiers = vision_width(model.config.width), engine.space.tiers
    vision = np.zeros((len(samples), len(tiers), width), np.float32)
    glance = np.zeros((len(samples), width), np.float32)
    pictures: dict[Path, list[int]] = {}
    for i, sample in enumerate(samples):
        pictures.setdefault(sample.image_path, []).append(i)
    paths = list(pictures)
    for t, tier in enumerate(tiers):
        for start in range(0, len(paths), PICTURES_AT_ONCE):
            part = paths[start : start + PICTURES_AT_ONCE]
            advance(t * len(paths) + start, len(tiers) * len(paths))
            for path, (looked, seen) in zip(part, _look(engine, part, tier), strict=True):
                vision[pictures[path], t] = looked
                if t == 0:
                    glance[pictures[path]] = seen
    return FeatureTable(language.astype(np.float32), glance, vision)


def _look(engine: Engine, paths: Sequence[Path], tier: str) -> list[tuple[Features32 | float, Features32 | float]]:
    """Features of each picture and of its global crop alone; one by one where they fail together."""
    run, blank = engine.runner, Request(images=(), question="what?")
    try:
        images = [run.open(Request(images=(path,), question="what?")) for path in paths]
        crops = [run.prepare(image, tier, blank).crops for image in images]
        tokens = [run.project(patches, one) for patches, one in zip(encode_all(run, crops), crops, strict=True)]
    except (*SAMPLE_ERRORS, UserError) as error:
        if len(paths) > 1:
            return [_look(engine, [path], tier)[0] for path in paths]
        _log.warning("%s cannot be looked at (%s); its features are zeros", paths[0], error)
        return [(0.0, 0.0)]
    return [(0.0, 0.0) if one is None else (vision_feature(one), glance_feature(one)) for one in tokens]


def feature_key(weights: str, samples: Sequence[Sample]) -> str:
    """Twelve hex digits of the model's weights and the questions with their pictures, in order."""
    about = [[s.dataset, *next(iter(question_digests([s]).items()))] for s in samples]
    return hashlib.sha256(json.dumps([weights, about]).encode()).hexdigest()[:12]


def obtain_features(
    folder: Path, weights: str, samples: Sequence[Sample], extract: Callable[[], FeatureTable]
) -> FeatureTable:
    """What is stored beside the results, else extracted and stored there.

    Where a picture could not be read, nothing is stored: it may be repaired.

    Args:
        folder: a results directory; where it cannot be written, nothing is stored.
        weights: hash of the model's weights.
        samples: the questions.
        extract: makes the features where there are none.
    """
    path = folder / _CACHE / f"{feature_key(weights, samples)}.safetensors"
    stored = _stored(path)
    if stored is not None and len(stored) == len(samples):
        return stored
    made = extract()
    if made.vision.any(axis=(1, 2)).all():
        _store(path, made)
    return made


def _stored(path: Path) -> FeatureTable | None:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        return None
    try:
        arrays: Mapping[str, Any] = load_file(path)
        return FeatureTable(*(arrays[name].astype(np.float32) for name in _TABLES))
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        _log.warning("%s: damaged (%s); making the features again", path, error)
        return None


def _store(path: Path, table: FeatureTable) -> None:
    from safetensors.numpy import save_file

    try:
        with whole(path) as part:
            save_file({name: np.ascontiguousarray(getattr(table, name)) for name in _TABLES}, part)
    except UserError as error:
        _log.warning("%s; features are not stored", error)
