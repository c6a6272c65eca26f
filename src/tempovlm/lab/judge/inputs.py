"""Content of the judged questions, baselines by name, and checkpoints as rules.

Shapes: `N` questions, `F` features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tempovlm.control.baselines import LinUCB, NearestNeighbours, question_features, varying
from tempovlm.control.policy import Policy, Question, Sight
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KNOBS, KnobSpace
from tempovlm.core.request import Request
from tempovlm.core.units import now_ms
from tempovlm.data.sample import Sample
from tempovlm.lab.judge import offline
from tempovlm.lab.judge.offline import PolicyRule, Rule, StaticMixture
from tempovlm.lab.table import Floats, Table, find_samples

if TYPE_CHECKING:
    from tempovlm.engine.runner import Runner

_ONLY = tuple(f"only_{knob}" for knob in KNOBS)
BASELINES = ("table", "fixed", "best_static", *_ONLY, "random", "knn", "linucb", "oracle")
"""Names that `--policies` takes beside paths of checkpoints."""

LOOKING = ("knn", "linucb")
"""Baselines that look at the question."""

_TIMED = 24
"""Questions on which a controller's own time is measured."""


def static_mixture(train: Table, dataset: str | None = None) -> StaticMixture:
    """The best mixture of static settings on the training questions, or on those of one data set."""
    own = train if dataset is None else train.take(train.dataset == dataset)
    return StaticMixture.fit(
        own.accuracy.mean(axis=0), np.median(own.latency_ms, axis=0), own.upper_ms.mean(axis=0)
    )


@dataclass(frozen=True)
class Content:
    """Content of the questions: samples by data set and question id."""

    samples: Mapping[tuple[str, str], Sample]
    _sizes: dict[Path, tuple[int, int]] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, tables: Sequence[Table], data_dir: Path | None) -> Content:
        """The samples of some tables' questions.

        Raises:
            UserError: the data folder has other questions.
        """
        samples: dict[tuple[str, str], Sample] = {}
        for table in tables:
            samples |= zip(table.questions, find_samples(table, data_dir), strict=True)
        return cls(samples)

    def of(self, table: Table, row: int) -> Sample:
        """The sample of a row."""
        return self.samples[str(table.dataset[row]), str(table.question_id[row])]

    def question_of(self, table: Table, row: int) -> Question:
        """A row's text, prompt style and picture size."""
        sample = self.of(table, row)
        return Question(text=sample.question, image_size=self._size(sample.image_path), style=sample.style)

    def features_of(self, table: Table) -> Floats:
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

    def __call__(self, table: Table, row: int, tier: str) -> Sight:
        """Return a policy's view of a row at a tier."""
        sample, run = self.content.of(table, row), self.runner
        key = (sample.image_path, tier)
        if key not in self._known:
            request = Request(images=(sample.image_path,), question=sample.question, style=sample.style)
            crops = run.prepare(run.open(request), tier, request).crops
            self._known[key] = run.project(run.encode(crops), crops)
        tiers = table.space.tiers  # the lowest may be left out; a glance is as it has it
        count = int(table.vision_tokens[row, tiers.index(tier)]) if tier in tiers else 0
        return Sight(tier, self._known[key], count, int(table.text_tokens[row]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """Inputs of the baselines: the training questions, and the judged ones' content if needed."""

    train: Table
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
        space, accuracy = self.train.space, self.train.accuracy.mean(axis=0)
        prices = (self.time_price, self.price_per_ms)
        if name == "table":
            return offline.table_rule(accuracy, *prices)
        if name == "fixed":
            return offline.Static(space.index(space.native))
        if name == "best_static":
            return offline.BestStatic(accuracy, np.quantile(self.train.upper_ms, self.level, axis=0))
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

    def rivals(self) -> dict[str, Rule]:
        """Rules that read nothing and for which time is free: the table, and each budget's best fixed setting."""
        free = replace(self, time_price=0.0, price_per_ms=0.0)
        return {name: free.rule(name) for name in ("table", "best_static")}

    def scorer(self, name: str) -> NearestNeighbours | LinUCB:
        """One of `LOOKING`, fitted to the training questions once."""
        if name not in self._fitted:
            table = self.train
            features = self.content().features_of(table)
            self._fitted[name] = (
                NearestNeighbours.fit(features, table.accuracy, table.image_id.tolist())
                if name == "knn"
                else LinUCB.fit(table.space, features, table.accuracy, table.upper_ms, seed=self.seed)
            )
        return self._fitted[name]

    def save(self, folder: Path, names: Sequence[str], weights_hash: str | None) -> list[Path]:
        """Write those of the named policies that were fitted here as checkpoints that can be served.

        Args:
            folder: where `NAME.pt` goes.
            names: of policies.
            weights_hash: hash of the model whose answers they learned from.

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
                    space=self.train.space,
                    weights_hash=weights_hash,
                    stamp=self.train.stamp,
                    options={"policy": name, "seed": self.seed, "questions": len(self.train)},
                )
        return paths


def learned_rule(
    path: Path,
    whole: KnobSpace,
    space: KnobSpace,
    runner: Runner,
    weights_hash: str,
    sights: Sights,
    time_price: float = 0.0,
    price_per_ms: float = 0.0,
) -> Rule:
    """The rule of a checkpoint.

    Args:
        path: of the checkpoint.
        whole: the model's settings, which controllers score.
        space: those to choose among.
        runner: of the model whose features the controller reads.
        weights_hash: hash of that model's weights.
        sights: encoded pictures.
        time_price: as `policy_rule` takes it.
        price_per_ms: as `policy_rule` takes it.

    Raises:
        UserError: the file cannot be used with this model, or its scores have no price.
    """
    from tempovlm.control.learned.policies import policy_from_checkpoint

    policy = policy_from_checkpoint(path, space, runner.model, runner.tokenizer, weights_hash, whole)
    return policy_rule(policy, sights.content, sights, time_price, price_per_ms)


def policy_rule(
    policy: Policy,
    content: Content,
    sights: Callable[[Table, int, str], Sight],
    time_price: float = 0.0,
    price_per_ms: float = 0.0,
) -> Rule:
    """The rule of a policy, which is shown the questions' content.

    Args:
        policy: what chooses.
        content: of the questions.
        sights: encoded pictures.
        time_price: accuracy that using the whole budget costs. Scores on another scale have none: those of GRPO
            were trained with their own.
        price_per_ms: accuracy that a millisecond costs.

    Raises:
        UserError: its scores have no price.
    """
    from tempovlm.control.guard import no_price

    if price_per_ms and policy.scale != "accuracy":
        raise no_price(policy.name, price_per_ms)
    own = time_price if policy.scale == "accuracy" else 0.0
    return PolicyRule(policy, content.question_of, sights, own, price_per_ms)


def measure_ms(rule: Rule, table: Table) -> float:
    """Median time of one question's choices at a budget that everything fits, pictures encoded before."""
    times_ms = []
    for i in range(min(_TIMED, len(table))):
        one = table.take(np.array([i]))
        budgets_ms = (float(one.upper_ms.max()),)
        rule(one, budgets_ms)
        start_ms = now_ms()
        rule(one, budgets_ms)
        times_ms.append(now_ms() - start_ms)
    return float(np.median(times_ms))
