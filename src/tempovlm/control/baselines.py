"""Policies without deep learning: nearest neighbours, a linear contextual bandit, and one by slack alone.

The first two predict the accuracy of every setting from the question's words and the picture's size, never from
its pixels: for many questions at once in the judge, or for one request behind the guard.

Shapes: `N` questions, `K` settings, `F` features.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from tempovlm.control.policy import Policy, Question
from tempovlm.control.select import TIE, Mask
from tempovlm.core.knobs import KNOBS, KnobSpace

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]
Size = tuple[int, int]

_WORD_COLUMNS = 32
_NEIGHBOURS = (8, 16, 32, 64, 128)
_FOLDS = 5
_NO_SPREAD = 1e300
"""Divisor for a column that never varies; finite, so that a checkpoint can hold it."""

NUM_FEATURES = _WORD_COLUMNS + 3
"""Number of features of a question."""

_WORD = re.compile(r"[a-z0-9]+")


class Scorer(Protocol):
    """Predicts the accuracy of each setting on a question."""

    def scores(self, features: Floats) -> Floats:
        """Return expected accuracies (N, K) from features (N, F)."""

    @property
    def usual(self) -> Floats:
        """(K,) expected accuracies over the training questions."""


def question_features(text: str, image_size: Size | None) -> Floats:
    """Return features (F,): hashed words and word pairs, the question's length, the picture's size.

    Words are hashed to signed columns as in K. Weinberger et al., Feature hashing for large scale multitask
    learning, 2009, arXiv 0902.2206.

    Args:
        text: the question.
        image_size: height and width in pixels; None without a picture.
    """
    words = _WORD.findall(text.lower())
    pairs = [f"{one} {two}" for one, two in pairwise(words)]
    columns = np.zeros(_WORD_COLUMNS)
    for token in (*words, *pairs):
        code = zlib.crc32(token.encode())
        columns[code % _WORD_COLUMNS] += 1.0 if code >> 16 & 1 else -1.0
    norm = float(np.linalg.norm(columns))
    shape = [0.0, 0.0]
    if image_size is not None:
        height, width = image_size
        shape = [math.log(width / height), math.log(width * height) / 10]
    return np.array([*(columns / norm if norm else columns), math.log1p(len(words)), *shape])


def picture_folds(images: Sequence[str]) -> NDArray[np.int64]:
    """Return the fold (n,) of each question by the name of its picture (n,), the same in every process."""
    return np.array([zlib.crc32(str(name).encode()) % _FOLDS for name in images])


def varying(space: KnobSpace, knobs: Sequence[str]) -> Mask:
    """Return the settings (K,) in which only the named knobs differ from the native setting."""
    native, fixed = space.native, [name for name in KNOBS if name not in knobs]
    return np.array([all(getattr(one, name) == getattr(native, name) for name in fixed) for one in space])


@dataclass(frozen=True)
class ScoredPolicy(Policy):
    """Scores settings by the accuracy that a scorer predicts from the question."""

    scorer: Scorer
    name: str
    scale = "accuracy"
    tie = TIE

    @property
    def usual(self) -> Floats:
        """(K,) expected accuracies over the training questions."""
        return self.scorer.usual

    def look(self, question: Question, left_ms: float) -> Floats:  # noqa: ARG002 - the protocol's
        """Return expected accuracies (K,)."""
        return self.scorer.scores(question_features(question.text, question.image_size)[None])[0]


@dataclass(frozen=True)
class SlackFit(Policy):
    """Takes the slowest setting whose time fits the slack, by buckets of time; it reads no question.

    A. Khare et al., SuperServe: fine-grained inference serving for unpredictable workloads, NSDI 2025, arXiv
    2312.16733: latencies of the networks that no quicker one beats are sorted into evenly spaced buckets, and the
    slack of the most urgent request picks the slowest bucket below it. There a bucket's largest batch runs; here
    requests are answered one at a time, so that its most accurate setting does.

    Attributes:
        lane_ms: (K,) expected times. accuracy: (K,) mean accuracies. num_buckets: between the least and most time.
    """

    lane_ms: Floats
    accuracy: Floats
    num_buckets: int = 10
    name: str = "slackfit"

    def look(self, question: Question, left_ms: float) -> Floats:  # noqa: ARG002 - the protocol's
        """Return places by accuracy (K,) of the settings in the bucket that fits, and lower ones of all others."""
        bucket = int(np.searchsorted(self._edges_ms, left_ms, side="right"))
        behind = np.where(self._buckets <= bucket, self._buckets - bucket, -self.num_buckets - self._buckets)
        return np.where(self._is_best, behind + self._gain, -np.inf)

    @cached_property
    def _is_best(self) -> Mask:
        """(K,) the settings than which no other is as quick and more accurate."""
        quicker = self.lane_ms[:, None] >= self.lane_ms
        better = (self.accuracy > self.accuracy[:, None]) | (
            (self.accuracy == self.accuracy[:, None]) & (self.lane_ms < self.lane_ms[:, None])
        )
        return np.isfinite(self.lane_ms) & ~(quicker & better).any(axis=1)

    @cached_property
    def _edges_ms(self) -> Floats:
        """(B,) the times up to which the buckets reach."""
        times_ms = self.lane_ms[self._is_best]
        return np.linspace(times_ms.min(), times_ms.max(), self.num_buckets)

    @cached_property
    def _buckets(self) -> NDArray[np.int64]:
        """(K,) the bucket of each setting, from 1; it fits the slacks that reach its end."""
        return np.searchsorted(self._edges_ms, self.lane_ms, side="left") + 1

    @cached_property
    def _gain(self) -> Floats:
        """(K,) the place of each setting by accuracy, less than 1."""
        return self.accuracy.argsort().argsort() / len(self.accuracy)


@dataclass(frozen=True, slots=True)
class _Scale:
    """Standardises features by the training questions; columns that never vary become zero."""

    centre: Floats
    spread: Floats

    @classmethod
    def fit(cls, features: Floats) -> _Scale:
        spread = features.std(axis=0)
        return cls(features.mean(axis=0), np.where(spread > 1e-9, spread, _NO_SPREAD))

    def __call__(self, features: Floats) -> Floats:
        return (features - self.centre) / self.spread


@dataclass(frozen=True, slots=True)
class NearestNeighbours:
    """Mean accuracies of the most similar training questions.

    The number of neighbours minimises the squared error on held-out training pictures. Surveys of routing find
    this baseline hard to beat (arXiv 2606.07587).

    Attributes:
        features: (n, F), standardised. accuracy: (n, K). neighbours: number of neighbours.
    """

    scale: _Scale
    features: Floats
    accuracy: Floats
    neighbours: int

    @classmethod
    def fit(
        cls, features: Floats, accuracy: Floats, images: Sequence[str], counts: Sequence[int] = _NEIGHBOURS
    ) -> NearestNeighbours:
        """Store the training questions.

        Args:
            features: (n, F).
            accuracy: (n, K).
            images: (n,) names of their pictures, which folds keep together.
            counts: numbers of neighbours to choose from.
        """
        scale = _Scale.fit(features)
        scaled = scale(features)
        possible = [count for count in counts if count < len(features)] or [1]
        if len(possible) == 1:
            return cls(scale, scaled, accuracy, possible[0])
        folds = picture_folds(images)
        errors = np.zeros(len(possible))
        for fold in np.unique(folds):
            seen = folds != fold
            if not seen.any():
                continue
            for i, count in enumerate(possible):
                part = cls(scale, scaled[seen], accuracy[seen], min(count, int(seen.sum())))
                errors[i] += ((part._mean(scaled[~seen]) - accuracy[~seen]) ** 2).sum()
        return cls(scale, scaled, accuracy, possible[int(np.argmin(errors))])

    @property
    def sizes(self) -> dict[str, int]:
        """Numbers of features and settings, checked against the model when a checkpoint is loaded."""
        return {"num_features": self.features.shape[1], "num_settings": self.accuracy.shape[1]}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the arrays for a checkpoint."""
        return _tensors(
            self.scale, {"features": self.features, "accuracy": self.accuracy, "neighbours": self.neighbours}
        )

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> NearestNeighbours:
        """Rebuild the policy from `state_dict`."""
        scale, arrays = _arrays(state)
        return cls(scale, arrays["features"], arrays["accuracy"], int(arrays["neighbours"]))

    @property
    def usual(self) -> Floats:
        """(K,) mean accuracies of the training questions."""
        return self.accuracy.mean(axis=0)

    def scores(self, features: Floats) -> Floats:
        """Return the neighbours' mean accuracies (N, K)."""
        return self._mean(self.scale(features))

    def _mean(self, scaled: Floats) -> Floats:
        squares = (self.features**2).sum(axis=1) - 2 * scaled @ self.features.T
        near = np.argpartition(squares, self.neighbours - 1, axis=1)[:, : self.neighbours]
        return self.accuracy[near].mean(axis=1)


@dataclass(frozen=True, slots=True)
class LinUCB:
    """A linear bandit: expected accuracy is linear in the question's features times the setting's knobs.

    L. Li et al., A contextual-bandit approach to personalized news article recommendation, 2010, arXiv 1003.0146,
    algorithm 1 with shared weights for all arms (W. Chu et al., Contextual bandits with linear payoff
    functions, 2011), because with weights for each of 75 arms every arm would see too few questions. It learns
    from the accuracy of the one setting that it tried in a round, not from the whole row. Own code, because
    maintained small bandit libraries such as MABWiser only offer separate weights for each arm. It does not
    explore after `fit`.

    Attributes:
        arms: (K, A) the settings' knobs. weights: (F + 1, A) mean of the learned weights.
    """

    scale: _Scale
    arms: Floats
    weights: Floats = field(repr=False)

    @classmethod
    def fit(
        cls,
        space: KnobSpace,
        features: Floats,
        accuracy: Floats,
        latency_ms: Floats,
        *,
        exploration: float = 0.3,
        ridge: float = 10.0,
        rounds: int = 4,
        seed: int = 0,
    ) -> LinUCB:
        """Learn online: play every training question `rounds` times, at budgets drawn log-uniformly.

        Args:
            space: the arms.
            features: (n, F).
            accuracy: (n, K), of which a round reveals one value.
            latency_ms: (n, K), decides what fits.
            exploration: weight of the uncertainty.
            ridge: strength of the ridge prior.
            rounds: passes over the questions.
            seed: seed of order and budgets.
        """
        scale, arms, rng = _Scale.fit(features), _arm_features(space), np.random.default_rng(seed)
        known = _with_one(scale(features))
        size = known.shape[1] * arms.shape[1]
        inverse, total = np.eye(size) / ridge, np.zeros(size)
        least, most = np.log(latency_ms.min()), np.log(latency_ms[np.isfinite(latency_ms)].max())
        for i in np.concatenate([rng.permutation(len(features)) for _ in range(rounds)]):
            fits = np.flatnonzero(latency_ms[i] <= np.exp(rng.uniform(least, most)))
            if not len(fits):
                continue
            joint = (known[i][:, None] * arms[fits][:, None, :]).reshape(len(fits), size)
            carried = joint @ inverse
            spread = np.sqrt(np.maximum((carried * joint).sum(axis=1), 0.0))
            pick = int(np.argmax(carried @ total + exploration * spread))
            row = carried[pick]
            inverse -= np.outer(row, row) / (1 + float(row @ joint[pick]))
            total += accuracy[i, fits[pick]] * joint[pick]
        return cls(scale, arms, (inverse @ total).reshape(known.shape[1], arms.shape[1]))

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes that are checked against the model when a checkpoint is loaded."""
        return {"num_features": len(self.weights) - 1, "num_settings": len(self.arms)}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the arrays for a checkpoint."""
        return _tensors(self.scale, {"arms": self.arms, "weights": self.weights})

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> LinUCB:
        """Rebuild the policy from `state_dict`."""
        scale, arrays = _arrays(state)
        return cls(scale, arrays["arms"], arrays["weights"])

    @property
    def usual(self) -> Floats:
        """(K,) expected accuracies at the training questions' mean features."""
        return self.weights[-1] @ self.arms.T

    def scores(self, features: Floats) -> Floats:
        """Return expected accuracies (N, K)."""
        return _with_one(self.scale(features)) @ self.weights @ self.arms.T


def _tensors(scale: _Scale, arrays: Mapping[str, Floats | int]) -> dict[str, Tensor]:
    import torch

    scaled: dict[str, Floats | int] = {"centre": scale.centre, "spread": scale.spread}
    # Copies, since torch warns of arrays that cannot be written to, as columns of results are.
    return {name: torch.as_tensor(np.array(values)) for name, values in (scaled | dict(arrays)).items()}


def _arrays(state: Mapping[str, Tensor]) -> tuple[_Scale, dict[str, Floats]]:
    arrays = {name: values.numpy() for name, values in state.items()}
    return _Scale(arrays["centre"], arrays["spread"]), arrays


def _with_one(features: Floats) -> Floats:
    return np.concatenate([np.ones((len(features), 1)), features], axis=1)


def _arm_features(space: KnobSpace) -> Floats:
    """Return arms (K, A): a constant 1, and for each knob a column per value above the first, 1 if reached."""
    rows = []
    for places in np.ndindex(space.shape):
        steps = [float(p >= s) for p, size in zip(places, space.shape, strict=True) for s in range(1, size)]
        rows.append([1.0, *steps])
    return np.array(rows)
