"""Computes what simulated policies know of each question: scores of all settings, computed before the simulation.

A policy whose scores change with the rest of the budget is asked at some budgets, and a request is given the
scores of the largest of them that is not above what it has left.

Shapes: `N` questions, `K` settings, `G` budgets left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tempovlm.control.baselines import SlackFit
from tempovlm.control.policy import Policy, Question
from tempovlm.control.select import TIE, Mask
from tempovlm.core.errors import UserError
from tempovlm.core.progress import Advance, silent
from tempovlm.lab.judge.inputs import Content, Sights
from tempovlm.lab.queueing.world import World
from tempovlm.lab.table import Floats, Table

NATIVE, SHEDS, GREEDY, TABLE, KIND = "native", "native_sheds", "greedy", "table", "kind"
SLACKFIT, CLAIRVOYANT = "slackfit", "clairvoyant"

NAMES = (NATIVE, SHEDS, GREEDY, SLACKFIT, TABLE, KIND, CLAIRVOYANT)
"""Policies with a name; others are paths of checkpoints. `clairvoyant:NAME` knows what another one knows."""

SHRUNK_BY = 10.0
"""Training questions of its data set that a kind of question is averaged with: its own few say little."""

_GRID = 12
"""Budgets left at which a policy is asked whose scores depend on it."""


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Chooser:
    """A policy in the simulator.

    Attributes:
        name: as asked for.
        scores: (G, N, K) of the first choice. settled: (G, N, K) of the second, of each tier as it is seen; None
            where the first is all.
        grid_ms: (G,) budgets left at which these hold, ascending.
        allowed: (K,) settings that it may take.
        tie: scores that differ by at most this count as equal.
        is_guarded: whether requests that cannot be in time are refused. leaves: whether it leaves those who wait
            their share of the time.
        has_price: whether scores are accuracies, which can be weighed against time.
        plans: whether it knows all arrivals. usual: (K,) of an ordinary question; by default the mean of those
            with all of the budget left.
    """

    name: str
    scores: Floats
    allowed: Mask
    settled: Floats | None = None
    grid_ms: Floats = field(default_factory=lambda: np.zeros(1))
    tie: float = TIE
    is_guarded: bool = True
    leaves: bool = True
    has_price: bool = True
    plans: bool = False
    usual: Floats | None = None

    def place(self, left_ms: float) -> int:
        """Return the place of the scores that hold with `left_ms` left."""
        return max(0, int(np.searchsorted(self.grid_ms, left_ms, side="right")) - 1)

    @property
    def mean_scores(self) -> Floats:
        """(K,) of an ordinary question with all of the budget left."""
        return self.usual if self.usual is not None else np.asarray(self.scores[-1].mean(axis=0), dtype=np.float64)


def of_scores(name: str, scores: Floats, space_size: int) -> Chooser:
    """Make a chooser of expected accuracies (N, K) that do not change with time."""
    return Chooser(name=name, scores=scores[None], allowed=np.ones(space_size, dtype=bool))


def named(name: str, world: World) -> Chooser:
    """Make one of `NAMES` but the clairvoyant.

    Raises:
        UserError: there is none of this name.
    """
    count, size = len(world.judged), len(world.space)
    if name in (NATIVE, SHEDS):
        only = np.arange(size) == world.native
        one = of_scores(name, np.broadcast_to(only.astype(float), (count, size)), size)
        return replace(one, allowed=only, is_guarded=name == SHEDS, has_price=False)
    if name in (GREEDY, TABLE):
        one = of_scores(name, np.broadcast_to(world.train.accuracy.mean(axis=0), (count, size)), size)
        return one if name == TABLE else replace(one, has_price=False, leaves=False)
    if name == SLACKFIT:
        return _slackfit(world)
    if name == KIND:
        return replace(of_scores(name, accuracy_by_kind(world.train, world.judged), size), tie=0.0)
    raise UserError(
        f"--policies {name}: no such policy and no such file; choose from {', '.join(NAMES)}, "
        f"{CLAIRVOYANT}:NAME, or give the path of a checkpoint"
    )


def _slackfit(world: World) -> Chooser:
    """Return the policy that takes the slowest setting that fits the slack, whoever waits."""
    policy = SlackFit(world.usual_ms, world.train.accuracy.mean(axis=0))
    grid_ms = np.linspace(0.0, 1.2 * float(world.usual_ms.max()), 10 * _GRID)
    scores = np.stack([policy.look(Question(text=""), left_ms) for left_ms in grid_ms])[:, None]
    shape = (len(grid_ms), len(world.judged), len(world.space))
    one = Chooser(name=SLACKFIT, scores=np.broadcast_to(scores, shape), allowed=np.ones(shape[2], dtype=bool))
    return replace(one, grid_ms=grid_ms, tie=0.0, has_price=False, leaves=False)


def knowing(chooser: Chooser) -> Chooser:
    """Return the clairvoyant that knows of each question what another policy knows.

    Raises:
        UserError: that policy's scores are no accuracies, or change with time.
    """
    if not chooser.has_price or len(chooser.scores) > 1 or chooser.settled is not None:
        raise UserError(
            f"--policies {CLAIRVOYANT}:{chooser.name}: its scores are no accuracies that hold at every budget; "
            f"choose {TABLE} or {KIND}"
        )
    return replace(chooser, name=f"{CLAIRVOYANT}:{chooser.name}", plans=True, has_price=False)


def accuracy_by_kind(train: Table, asked: Table) -> Floats:
    """(N, K) mean accuracy of the training questions of a question's kind, drawn towards that of its data set.

    The kind is the template that a generated question is made of, which no request tells: a reference for what
    knowing the question is worth, not a policy that can serve.
    """
    result = np.empty(asked.accuracy.shape)
    for dataset in np.unique(asked.dataset):
        own = train.accuracy[train.dataset == dataset]
        whole = own.mean(axis=0) if len(own) else train.accuracy.mean(axis=0)
        for kind in np.unique(asked.template[asked.dataset == dataset]):
            same = train.accuracy[(train.dataset == dataset) & (train.template == kind)]
            mean = (same.sum(axis=0) + SHRUNK_BY * whole) / (len(same) + SHRUNK_BY)
            result[(asked.dataset == dataset) & (asked.template == kind)] = mean
    return result


def of_policy(
    name: str,
    policy: Policy,
    world: World,
    content: Content,
    sights: Sights,
    budgets_ms: Sequence[float],
    advance: Advance = silent,
) -> Chooser:
    """Ask a policy about every question, at several budgets left.

    Args:
        name: as asked for.
        policy: the policy.
        world: whose questions are asked.
        content: their words and pictures.
        sights: encoded pictures.
        budgets_ms: of the requests.
        advance: told of what is done.
    """
    table, count = world.judged, len(world.judged)
    grid_ms = np.geomspace(float(world.bound_ms.min()), max(budgets_ms), _GRID)
    shape = (_GRID, count, len(world.space))
    scores = np.empty(shape, dtype=np.float32)
    settled = np.empty(shape, dtype=np.float32) if policy.sees_picture else None
    look_ms = world.train.stages_ms(("T_preprocess", "T_vision_encoder", "T_projector"))
    for row in range(count):
        question = content.question_of(table, row)
        if policy.sees_glance:
            seen = sights(table, row, table.space.tiers[0]).vision
            question = replace(question, glance=None if seen is None else seen[:1])
        for place, left_ms in enumerate(grid_ms):
            asked = replace(question, left_ms=float(left_ms))
            scores[place, row] = policy.look(asked, float(left_ms))
            if settled is None:
                continue
            for tier, name_of_tier in enumerate(table.space.tiers):
                part = slice(tier * table.per_tier, (tier + 1) * table.per_tier)
                sight = sights(table, row, name_of_tier)
                settled[place, row, part] = policy.settle(asked, sight, float(left_ms - look_ms[tier]))[part]
        advance(row + 1, count)
    if settled is None and (scores == scores[:1]).all():
        scores, grid_ms = scores[:1], grid_ms[:1]
    return Chooser(
        name=name,
        scores=scores.astype(np.float64),
        settled=None if settled is None else settled.astype(np.float64),
        grid_ms=grid_ms,
        usual=None if policy.usual is None else np.asarray(policy.usual, dtype=np.float64),
        allowed=np.ones(len(world.space), dtype=bool),
        tie=policy.tie,
        has_price=policy.scale == "accuracy",
    )
