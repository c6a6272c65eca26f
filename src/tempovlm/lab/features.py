"""Features that controllers' networks see of a question, made once and kept in a file, and the job of a training.

Shapes: `N` questions, `T` tiers, `L` and `V` widths of features, `D` width of a token.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tempovlm.control.learned.observation import (
    glance_feature,
    language_feature,
    question_ids,
    token_vectors,
    vision_feature,
    vision_width,
)
from tempovlm.control.select import Ints, Mask
from tempovlm.core.errors import UserError
from tempovlm.core.paths import whole
from tempovlm.core.progress import Advance, progress_bar, silent
from tempovlm.core.request import Request
from tempovlm.data.digest import question_digests
from tempovlm.data.sample import Sample
from tempovlm.engine.batching import encode_all
from tempovlm.engine.engine import Engine
from tempovlm.lab.core_exp.batched import SAMPLE_ERRORS
from tempovlm.lab.options import LearningFlags
from tempovlm.lab.table import Table, find_samples, read_table
from tempovlm.latency.estimator import Estimator, load_estimator

Features32 = NDArray[np.float32]

PICTURES_AT_ONCE = 16

_CACHE = ".features"
"""Folder of stored features within a results directory."""

_TABLES = ("language", "glance", "vision")

_log = logging.getLogger("tempovlm")


@dataclass(frozen=True, eq=False, slots=True)
class FeatureTable:
    """Inputs of the networks, by question: language (N, L), glance (N, V) and, by tier, vision (N, T, V)."""

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


@dataclass(frozen=True, kw_only=True)
class LearningJob(LearningFlags):
    """A controller's training: its material, and the folder that it is left in.

    Attributes:
        engine: with the model whose features the controller sees. weights_hash: hash of its weights.
    """

    engine: Engine
    weights_hash: str

    def read(self, results_dirs: Sequence[Path]) -> tuple[Table, list[Sample]]:
        """Read the questions of results directories, and find their pictures.

        Raises:
            UserError: results or data set are missing, damaged, or do not belong together.
        """
        table = read_table(results_dirs, self.engine.space, self.datasets, weights_hash=self.weights_hash)
        return table, find_samples(table, self.data_dir)

    @property
    def estimator(self) -> Estimator | None:
        """The latency estimator, where one is named.

        Raises:
            UserError: it cannot be read, or is of another knob space.
        """
        path = self.latency_estimator_path
        return None if path is None else load_estimator(path, self.engine.space)

    def features(self, folder: Path, samples: Sequence[Sample]) -> FeatureTable:
        """Return the features stored beside results; make and store them first if there are none."""

        def extract() -> FeatureTable:
            with progress_bar(f"looking at the pictures of {len(samples)} questions") as advance:
                return extract_features(self.engine, samples, advance)

        return obtain_features(folder, self.weights_hash, samples, extract)


def extract_features(engine: Engine, samples: Sequence[Sample], advance: Advance = silent) -> FeatureTable:
    """Run every picture once at each tier; a picture that cannot be read has zeros."""
    width, tiers = vision_width(engine.runner.model.config.width), engine.space.tiers
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
    return FeatureTable(language_features(engine, samples), glance, vision)


def language_features(engine: Engine, samples: Sequence[Sample]) -> Features32:
    """(N, L) of the questions' words, for which no picture is opened."""
    vectors = token_vectors(engine.runner.model)
    ids = [question_ids(engine.runner.tokenizer, sample.question) for sample in samples]
    return np.stack([language_feature(vectors, one) for one in ids]).astype(np.float32)


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


def feature_key(weights_hash: str, samples: Sequence[Sample]) -> str:
    """Twelve hex digits of the model's weights and the questions with their pictures, in order."""
    about = [[s.dataset, *next(iter(question_digests([s]).items()))] for s in samples]
    return hashlib.sha256(json.dumps([weights_hash, about]).encode()).hexdigest()[:12]


def obtain_features(
    folder: Path, weights_hash: str, samples: Sequence[Sample], extract: Callable[[], FeatureTable]
) -> FeatureTable:
    """Return the features stored beside the results, else extract and store them there.

    Where a picture could not be read, nothing is stored: it may be repaired.

    Args:
        folder: a results directory; where it cannot be written, nothing is stored.
        weights_hash: hash of the model's weights.
        samples: the questions.
        extract: makes the features where there are none.
    """
    path = folder / _CACHE / f"{feature_key(weights_hash, samples)}.safetensors"
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
