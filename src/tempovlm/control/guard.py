"""The guard around every policy: it lets through only settings that are expected to end within the budget.

It guards both choices, each with a calibrated table of its own: upper totals before the tier, upper remainders
before top-k and depth, where the budget left is what the clock says. Where nothing fits, it runs the cheapest
setting and says so. Of what fits, `select.best` takes the setting that the policy scores highest.

A policy that glances makes its first choice later. The tables hold the glance's cutting and encoding, since every
tier needs the global crop: only what a glance took beyond an ordinary look at the lowest tier is charged, beside
what the tables do not hold, which is measured: the policy's own time, and what encoding in two passes costs.

What an answer took is told to the guard, whose bounds follow a machine that is slower or faster than calibrated.

Shapes: `K` settings of the knob space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from tempovlm.control.margin import OnlineMargin
from tempovlm.control.policies import FIXED, FixedPolicy
from tempovlm.control.policy import Policy, Question, Sight
from tempovlm.control.select import Floats, Mask, best
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobConfig, KnobSpace
from tempovlm.core.request import Answer, Prediction, Request
from tempovlm.core.units import now_ms
from tempovlm.latency.profile import LatencyProfile

CONTROL_REPEATS = 20
"""Times that a policy's own cost is measured."""

CONTROL_SHARE = 0.9
"""Quantile of those times that is charged; the maximum is usually an interruption."""

CROWD_BYTES = 1 << 25
"""Bytes touched before each timing to evict the CPU caches, as streaming the model's weights would."""


@dataclass(frozen=True, slots=True)
class TierChoice:
    """The first choice.

    Attributes:
        feasible: None where there is no budget or nothing was calibrated.
        index: the setting that was best; its tier is the choice.
        scores: (K,) of the policy; None where it was not asked.
    """

    tier: str
    question: Question
    feasible: bool | None
    index: int
    scores: Floats | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """The whole setting, what it is expected to take, and which policy chose it.

    Attributes:
        predicted: the whole answer; None where nothing was calibrated. step_ms: a decode step, 0 likewise.
    """

    knobs: KnobConfig
    feasible: bool | None
    predicted: Prediction | None
    step_ms: float
    policy: str


@dataclass(frozen=True)
class Guard:
    """Wraps a policy; of requests it holds nothing but the margin.

    Tables are arrays that are made once: the choices are made while the caches hold the model's weights, when
    touching anything costs several times what a loop over it suggests.

    Attributes:
        choices: indices of the settings that may run at all, ascending.
        profile: None where the machine was not calibrated: nothing is masked and nothing predicted.
        control_ms: the policy's measured own time, for both choices, that calibration did not see.
        second_ms: the second choice's part of it; None charges all of it there too.
        split_ms: by tier, what it takes longer to encode the global crop first and the tiles later.
        margin: the bounds' factor, by what answers took; None leaves them as they were calibrated.
    """

    policy: Policy
    space: KnobSpace
    choices: tuple[int, ...]
    profile: LatencyProfile | None = None
    control_ms: float = 0.0
    second_ms: float | None = None
    split_ms: Mapping[str, float] = field(default_factory=dict)
    margin: OnlineMargin | None = None

    @classmethod
    def around(
        cls,
        policy: Policy,
        space: KnobSpace,
        profile: LatencyProfile | None,
        glance: Callable[[], Any] | None = None,
        split_ms: Mapping[str, float] | None = None,
    ) -> Guard:
        """Guard a policy over the whole knob space; measures what the policy itself takes.

        Args:
            policy: to be guarded.
            space: the settings.
            profile: of this machine.
            glance: projects a glance, for a policy that needs one: measured with the policy.
            split_ms: by tier, what it takes longer to encode in two passes.
        """
        everything = tuple(range(len(space)))
        first_ms, second_ms = measure_control_ms(policy, space, glance)
        own_ms = first_ms + second_ms
        guard = cls(policy, space, everything, profile, own_ms, second_ms, split_ms or {}, OnlineMargin())
        guard._make_tables()
        return guard

    def _make_tables(self) -> None:
        """Look up now what every choice needs, or a process's first answer pays for it."""
        _ = self._totals_ms, self._remainders_ms, self._cheapest
        if self.profile is not None:
            self.profile.p50_prefix_ms(0)
            self._choice(self._cheapest, None, 0.0, "")

    def budgets_ms(self) -> Floats:
        """(K,) the least budget that lets each setting run, where the picture opens in the usual time."""
        opened_ms = 0.0 if self.profile is None else self.profile.open_ms
        return self._factor * self._totals_ms[self.policy.sees_glance] + opened_ms + self.control_ms

    @classmethod
    def fixed(cls, knobs: KnobConfig, space: KnobSpace, profile: LatencyProfile | None = None) -> Guard:
        """One setting, whatever the budget.

        Raises:
            UserError: the setting is not in the knob space.
        """
        return cls(FixedPolicy(knobs, space), space, (space.index(knobs),), profile)

    def only(self, choices: Iterable[int]) -> Guard:
        """The same guard over fewer settings."""
        return replace(self, choices=tuple(sorted(choices)))

    def wants_glance(self, request: Request, elapsed_ms: float) -> bool:
        """Whether the policy glances and has something to choose, after `elapsed_ms` of opening the picture."""
        if request.budget_ms is None or not self.policy.sees_glance:
            return False
        return self._is_open(self._fitting(self._left_ms(request.budget_ms, elapsed_ms, glanced=False), 0))

    def pools(self, request: Request) -> bool:
        """Whether the second choice wants the picture's pooled tokens."""
        return self.policy.sees_picture and request.budget_ms is not None and len(self.choices) > 1

    def choose_tier(
        self, request: Request, image_size: tuple[int, int] | None, elapsed_ms: float, glance: Any = None
    ) -> TierChoice:
        """The tier, after `elapsed_ms` of opening the picture and of encoding the glance, if there is one.

        `glance` is (1, G, D) the projected tokens of the global crop.

        Raises:
            UserError: time has a price, and the policy's scores are no accuracies.
        """
        budget_ms = request.budget_ms
        if budget_ms is None:
            return self._tier_choice(self._unbounded, Question(text=request.question), None)
        self._check_price(request)
        left_ms = self._left_ms(budget_ms, elapsed_ms, glanced=glance is not None)
        fits = self._fitting(left_ms, int(glance is not None))
        feasible = None if self.profile is None else bool(fits.any())
        question = Question(
            text=request.question, image_size=image_size, left_ms=left_ms, style=request.style, glance=glance
        )
        if not self._is_open(fits):
            return self._tier_choice(int(fits.argmax()) if fits.any() else self._cheapest, question, feasible)
        scores = self.policy.look(question, left_ms)
        index = int(best(scores, fits, self._costs_ms, request.price_per_ms, self.policy.tie))
        return self._tier_choice(index, question, feasible, scores)

    def choose_compute(self, request: Request, chosen: TierChoice, sight: Sight, elapsed_ms: float) -> Choice:
        """Top-k and depth, after `elapsed_ms` of looking at the picture."""
        budget_ms = request.budget_ms
        if budget_ms is None:
            return self._choice(self._unbounded, None, elapsed_ms, FIXED)
        left_ms = budget_ms - elapsed_ms - (self.control_ms if self.second_ms is None else self.second_ms)
        of_tier = self._of_tier[chosen.tier]
        fits = of_tier & (self._factor * self._remainders_ms <= left_ms)
        count = np.count_nonzero(fits)
        if count > 1:
            scores = self._settled(chosen, sight, left_ms)
            index = int(best(scores, fits, self._costs_ms, request.price_per_ms, self.policy.tie))
        else:
            index = int(fits.argmax()) if count else int(np.where(of_tier, self._costs_ms, np.inf).argmin())
        return self._choice(index, chosen.feasible and bool(count), elapsed_ms, self.policy.name)

    def observe(self, answer: Answer, opened_ms: float) -> None:
        """Learn from a whole answer, whose picture took `opened_ms` to open, what bounds are worth by now."""
        if self.margin is None or self.profile is None or answer.finish_reason in ("deadline", "cancelled"):
            return
        took_ms = answer.timings_ms["total"] - opened_ms - answer.timings_ms["control"]
        bounds_ms = self._totals_ms[self.policy.sees_glance]
        self.margin.observe(took_ms, float(bounds_ms[self.space.index(answer.knobs)]))

    def _settled(self, chosen: TierChoice, sight: Sight, left_ms: float) -> Floats:
        """The policy's scores (K,) at the second choice."""
        policy = self.policy
        if policy.sees_picture or (chosen.scores is None and not policy.sees_glance):
            return policy.settle(chosen.question, sight, left_ms)
        # A policy that glances had no glance where nothing was open to it; then the first choice stays.
        return np.eye(len(self.space))[chosen.index] if chosen.scores is None else chosen.scores

    def _check_price(self, request: Request) -> None:
        if request.price_per_ms and len(self.choices) > 1 and self.policy.scale != "accuracy":
            raise no_price(self.policy.name, request.price_per_ms)

    def _tier_choice(
        self, index: int, question: Question, feasible: bool | None, scores: Floats | None = None
    ) -> TierChoice:
        return TierChoice(self.space.settings[index].tier, question, feasible, index, scores)

    @cached_property
    def _open(self) -> Mask:
        """(K,) the settings that may run at all."""
        mask = np.zeros(len(self.space), dtype=bool)
        mask[list(self.choices)] = True
        return mask

    @cached_property
    def _of_tier(self) -> dict[str, Mask]:
        """(K,) of those, the settings of each tier."""
        tiers = np.array([knobs.tier for knobs in self.space])
        return {tier: self._open & (tiers == tier) for tier in self.space.tiers}

    @cached_property
    def _costs_ms(self) -> Floats:
        """(K,) medians of whole answers, by which ties are broken; without a profile, places in the space."""
        profile, places = self.profile, range(len(self.space))
        costs_ms = np.array([float(i) if profile is None else profile.p50_total_ms(i) for i in places])
        return np.where(self._open, costs_ms, np.inf)

    @cached_property
    def _totals_ms(self) -> tuple[Floats, Floats]:
        """(K,) bounds on answers from the opened picture on, without and with a glance; none without a profile."""
        profile = self.profile
        if profile is None:
            unbounded = np.full(len(self.space), -np.inf)
            return unbounded, unbounded
        upper_ms = np.array([profile.upper_total_ms(i) - profile.open_ms for i in range(len(self.space))])
        return upper_ms, upper_ms + np.array([self.split_ms.get(knobs.tier, 0.0) for knobs in self.space])

    @cached_property
    def _remainders_ms(self) -> Floats:
        """(K,) bounds on prefill and decode; none without a profile."""
        profile, places = self.profile, range(len(self.space))
        return np.array([-np.inf if profile is None else profile.upper_remainder_ms(i) for i in places])

    @property
    def _factor(self) -> float:
        return 1.0 if self.margin is None else self.margin.factor

    def _left_ms(self, budget_ms: float, elapsed_ms: float, *, glanced: bool) -> float:
        """What is left for a whole answer, of which opening the picture and the glance are parts."""
        left_ms, profile = budget_ms - elapsed_ms - self.control_ms, self.profile
        if profile is None:
            return left_ms
        # The table holds an ordinary picture's opening, and an ordinary look at the lowest tier.
        return left_ms + (min(elapsed_ms, profile.p50_prefix_ms(0)) if glanced else profile.open_ms)

    def _fitting(self, left_ms: float, glances: int) -> Mask:
        """(K,) the settings whose upper total, with that of 0 or 1 glances, fits."""
        opened_ms = 0.0 if self.profile is None else self.profile.open_ms  # which `_left_ms` gave back
        return self._open & (self._factor * self._totals_ms[glances] <= left_ms - opened_ms)

    def _is_open(self, fits: Mask) -> bool:
        """Whether there is something to choose first: a setting, or for a policy that settles later, a tier."""
        if not self.policy.sees_picture:
            return bool(np.count_nonzero(fits) > 1)
        places = fits.nonzero()[0]
        per_tier = len(self.space) // len(self.space.tiers)
        return bool(len(places) and places[0] // per_tier != places[-1] // per_tier)

    def _choice(self, index: int, feasible: bool | None, elapsed_ms: float, policy: str) -> Choice:
        """The setting, with what has passed and what the rest is expected to take."""
        knobs, profile = self.space.settings[index], self.profile
        if profile is None:
            return Choice(knobs, feasible, None, 0.0, policy)
        predicted = Prediction(
            p50_ms=elapsed_ms + profile.p50_remainder_ms(index),
            upper_ms=elapsed_ms + self._factor * profile.upper_remainder_ms(index),
        )
        return Choice(knobs, feasible, predicted, profile.step_ms(index), policy)

    @cached_property
    def _unbounded(self) -> int:
        """Without a budget: the model as trained, or the most that may run."""
        native = self.space.index(self.space.native)
        return native if native in self.choices else self.choices[-1]

    @cached_property
    def _cheapest(self) -> int:
        return int(self._costs_ms.argmin())


def no_price(policy: str, price_per_ms: float) -> UserError:
    """Say that a policy's scores cannot be weighed against time."""
    return UserError(
        f"--price_per_ms {price_per_ms:g}: policy {policy} scores settings by logits, which have no price in "
        "accuracy; give 0, or a policy that predicts accuracy: table, nearest neighbours or LinUCB"
    )


def measure_control_ms(
    policy: Policy, space: KnobSpace, glance: Callable[[], Any] | None = None
) -> tuple[float, float]:
    """Measure the times that a policy's first and second scoring keep in most of a few tries.

    `glance` projects a glance, which belongs to the first one.
    """
    times_ms, crowd = [], np.zeros(CROWD_BYTES, dtype=np.uint8)
    for number in range(CONTROL_REPEATS):
        # Never the same: a policy may remember the last question and the last budget.
        text, budget_ms = f"what does sign {number} say?", 1e9 + number
        crowd += 1
        start_ms = now_ms()
        seen = glance() if glance is not None and policy.sees_glance else None
        question = Question(text=text, image_size=(336, 448), left_ms=budget_ms, glance=seen)
        scores = policy.look(question, budget_ms)
        middle_ms = end_ms = now_ms()
        if policy.sees_picture:
            tier = space.settings[int(scores.argmax())].tier
            policy.settle(question, Sight(tier, None, 0, 0), budget_ms)
            end_ms = now_ms()
        times_ms.append((middle_ms - start_ms, end_ms - middle_ms))
    first_ms, second_ms = np.quantile(times_ms[1:], CONTROL_SHARE, axis=0, method="higher").tolist()
    return first_ms, second_ms
