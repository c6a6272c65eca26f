"""Policies without deep learning: what a learned controller has to beat.

A table, nearest neighbours and a linear contextual bandit. Each scores every setting and takes the best of those
still allowed, so each works on whole arrays, for the judge, and question by question behind the guard. They look
at the question's words and at the picture's shape, never at its pixels; what fits a budget is somebody else's
business.

Shapes: `N` questions, `K` settings, `F` features.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tempovlm.control.policies import TIE
from tempovlm.control.policy import Features, Question
from tempovlm.core.knobs import KnobConfig, KnobSpace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
Size = tuple[int, int]

KNOBS = ("tier", "top_k", "num_blocks")

_WORD_COLUMNS = 32
_NEIGHBOURS = (8, 16, 32, 64, 128)
_FOLDS = 5
_WORD = re.compile(r"[a-z0-9]+")


class Scorer(Protocol):
    """Says how well each setting would do on a question."""

    def scores(self, features: Floats) -> Floats:
        """(N, K) expected accuracies from features (N, F)."""


Featurise = Callable[[str, Size | None], Floats]


def question_features(text: str, image_size: Size | None) -> Floats:
    """(F,) features: hashed words and pairs of neighbouring words, the question's length, the picture's shape.

    Words go to signed columns, after K. Weinberger et al., Feature hashing for large scale multitask learning,
    2009, arXiv 0902.2206.

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


def features_of(texts: Sequence[str], sizes: Sequence[Size | None], featurise: Featurise) -> Floats:
    """(N, F) features of many questions."""
    return np.stack([featurise(text, size) for text, size in zip(texts, sizes, strict=True)])


def varying(space: KnobSpace, knobs: Sequence[str]) -> Mask:
    """(K,) the settings where only the named knobs differ from the native setting."""
    native, fixed = space.native, [name for name in KNOBS if name not in knobs]
    return np.array([all(getattr(one, name) == getattr(native, name) for name in fixed) for one in space])


def choose_best(scores: Floats, allowed: Mask, cost_ms: Floats, tie: float = TIE) -> Ints:
    """(N,) the best-scored allowed setting, the cheapest of those within a tie.

    Where nothing is allowed, the cheapest setting.

    Args:
        scores: (N, K).
        allowed: (N, K).
        cost_ms: (N, K), infinite for a setting that is not there.
        tie: scores that differ by at most this count as equal.
    """
    best = np.max(np.where(allowed, scores, -np.inf), axis=1, keepdims=True)
    near = allowed & (scores >= best - tie)
    near = np.where(allowed.any(axis=1, keepdims=True), near, True)
    return np.argmin(np.where(near, cost_ms, np.inf), axis=1).astype(np.int64)


@dataclass(frozen=True, slots=True)
class ScoredPolicy:
    """Takes the best-scored setting among those that the guard allows.

    Attributes:
        cost_ms: (K,) what settings take, to break ties. featurise: the scorer's features of a question.
        allowed: (K,) settings that it may take at all; outside them it falls back to the cheapest choice.
    """

    space: KnobSpace
    scorer: Scorer
    cost_ms: Floats
    allowed: Mask
    name: str
    featurise: Featurise = question_features

    def choose_tier(self, question: Question, budget_ms: float) -> str:  # noqa: ARG002 - the guard masked by it
        """The best setting's tier."""
        return self._best(question, question.choices).tier

    def choose_compute(self, features: Features | None, tier: str, budget_ms: float) -> tuple[int, int]:  # noqa: ARG002
        """Top-k and depth of the tier's best setting; without features, of the average question's."""
        settings = features.choices if features else self.space.settings
        question = features.question if features else Question(text="", choices=settings)
        best = self._best(question, tuple(knobs for knobs in settings if knobs.tier == tier))
        return best.top_k, best.num_blocks

    def _best(self, question: Question, choices: tuple[KnobConfig, ...]) -> KnobConfig:
        open_to = np.zeros(len(self.space), dtype=bool)
        open_to[[self.space.index(knobs) for knobs in choices]] = True
        scores = self.scorer.scores(self.featurise(question.text, question.image_size)[None])
        cost_ms = np.where(open_to, self.cost_ms, np.inf)
        index = choose_best(scores, (open_to & self.allowed)[None], cost_ms[None])
        return self.space.settings[int(index[0])]


@dataclass(frozen=True, slots=True)
class ConstantScores:
    """The same accuracies whatever the question: a table; accuracy (K,)."""

    accuracy: Floats

    def scores(self, features: Floats) -> Floats:
        """(N, K) the table's row for each question."""
        return np.broadcast_to(self.accuracy, (len(features), len(self.accuracy)))


@dataclass(frozen=True, slots=True)
class _Scale:
    """Standardises features by those of the training questions; columns that never vary stay zero."""

    centre: Floats
    spread: Floats

    @classmethod
    def fit(cls, features: Floats) -> _Scale:
        spread = features.std(axis=0)
        return cls(features.mean(axis=0), np.where(spread > 1e-9, spread, np.inf))

    def __call__(self, features: Floats) -> Floats:
        return (features - self.centre) / self.spread


@dataclass(frozen=True, slots=True)
class NearestNeighbours:
    """Mean accuracies of the most similar training questions.

    The number of neighbours is the one with the least squared error on held-out training pictures. Routing surveys
    find it hard to beat (arXiv 2606.07587).

    Attributes:
        features: (n, F) standardised, of the training questions. accuracy: (n, K) theirs. neighbours: how many.
    """

    scale: _Scale
    features: Floats
    accuracy: Floats
    neighbours: int

    @classmethod
    def fit(
        cls, features: Floats, accuracy: Floats, images: Sequence[str], counts: Sequence[int] = _NEIGHBOURS
    ) -> NearestNeighbours:
        """Remember the training questions; `images` (n,) names the picture of each, which folds keep whole."""
        scale = _Scale.fit(features)
        scaled = scale(features)
        folds = np.array([zlib.crc32(str(name).encode()) % _FOLDS for name in images])
        possible = [count for count in counts if count < len(features)] or [1]
        errors = np.zeros(len(possible))
        for fold in np.unique(folds):
            seen = folds != fold
            if not seen.any():
                continue
            for i, count in enumerate(possible):
                part = cls(scale, scaled[seen], accuracy[seen], min(count, int(seen.sum())))
                errors[i] += ((part._mean(scaled[~seen]) - accuracy[~seen]) ** 2).sum()
        return cls(scale, scaled, accuracy, possible[int(np.argmin(errors))])

    def scores(self, features: Floats) -> Floats:
        """(N, K) the neighbours' mean accuracies."""
        return self._mean(self.scale(features))

    def _mean(self, scaled: Floats) -> Floats:
        squares = (self.features**2).sum(axis=1) - 2 * scaled @ self.features.T
        near = np.argpartition(squares, self.neighbours - 1, axis=1)[:, : self.neighbours]
        return self.accuracy[near].mean(axis=1)


@dataclass(frozen=True, slots=True)
class LinUCB:
    """A linear bandit: expected accuracy is linear in the question's features times the setting's knobs.

    L. Li et al., A contextual-bandit approach to personalized news article recommendation, 2010, arXiv 1003.0146,
    algorithm 1 with one set of weights for all arms (W. Chu et al., Contextual bandits with linear payoff
    functions, 2011), since 75 arms of their own would each see too few questions. It learns from the accuracy of
    the setting that it tried, one a round, never from the whole row. Written here because the bandits of light
    maintained libraries, such as MABWiser, keep weights for each arm alone. After `fit` it no longer explores.

    Attributes:
        arms: (K, A) the settings' knobs. weights: (F + 1, A) of the learnt mean.
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
        """Play every training question `rounds` times, each at a budget drawn log-uniformly, and learn online.

        Args:
            space: the arms.
            features: (n, F).
            accuracy: (n, K), of which a round sees one value.
            latency_ms: (n, K), which says what fits.
            exploration: weight of the uncertainty.
            ridge: strength of the prior.
            rounds: passes over the questions.
            seed: of order and budgets.
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

    def scores(self, features: Floats) -> Floats:
        """(N, K) expected accuracies."""
        return _with_one(self.scale(features)) @ self.weights @ self.arms.T


def _with_one(features: Floats) -> Floats:
    return np.concatenate([np.ones((len(features), 1)), features], axis=1)


def _arm_features(space: KnobSpace) -> Floats:
    """(K, A) a one, and for each knob whether its value is at least the second, the third and so on."""
    values = (space.tiers, space.top_ks, space.block_counts)
    rows = []
    for knobs in space:
        own = (knobs.tier, knobs.top_k, knobs.num_blocks)
        places = [legal.index(value) for legal, value in zip(values, own, strict=True)]
        steps = [float(p >= s) for p, legal in zip(places, values, strict=True) for s in range(1, len(legal))]
        rows.append([1.0, *steps])
    return np.array(rows)
