"""The guard around every policy: it lets through only settings that are expected to end within the budget.

It guards both choices, each with a calibrated table of its own: upper totals before the tier, upper remainders
before top-k and depth, where the budget left is what the clock says. Where nothing fits, it runs the cheapest
setting and says so. A policy whose choice is not allowed is corrected towards the cheaper side.

A policy that glances makes its first choice later. The tables hold the glance's cutting and encoding, since every
tier needs the global crop: only what a glance took beyond an ordinary look at the lowest tier is charged, beside
what the tables do not hold, which is measured: the policy's own time, and what encoding in two passes costs.

What an answer took is told to the guard, whose bounds follow a machine that is slower or faster than calibrated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from tempovlm.control.margin import OnlineMargin
from tempovlm.control.policies import FIXED, FixedPolicy
from tempovlm.control.policy import ChoosesAtOnce, Features, Policy, Question, Sight, needs_glance
from tempovlm.core.knobs import KnobConfig, KnobSpace
from tempovlm.core.request import Answer, Prediction, Request
from tempovlm.core.units import now_ms
from tempovlm.latency.profile import LatencyProfile

Bounds = tuple[tuple[KnobConfig, float], ...]
"""Settings in index order, each with its calibrated bound; before the factor of the margin."""

CONTROL_REPEATS = 20
"""Times that a policy's own cost is measured."""

CONTROL_SHARE = 0.9
"""Of those times: how many the cost covers. The largest would be whatever interrupted the measuring."""

CROWD_BYTES = 1 << 25
"""What is walked through before each of them, as a model's weights are between two choices: nothing stays near."""


@dataclass(frozen=True, slots=True)
class TierChoice:
    """The first choice.

    Attributes:
        feasible: None where there is no budget or nothing was calibrated.
        wanted: the whole setting, of a policy that chooses it at once.
    """

    tier: str
    question: Question
    feasible: bool | None
    wanted: KnobConfig | None = None


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

    What does not change between requests is looked up once: the choices are made while the caches hold the
    model's weights, when touching anything costs several times what a loop over it suggests.

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
        _ = self._totals, self._remainders, self._cheapest
        if self.profile is not None:
            self.profile.p50_prefix_ms(0)
            self._choice(self._cheapest, None, 0.0, "")

    @classmethod
    def fixed(cls, knobs: KnobConfig, space: KnobSpace, profile: LatencyProfile | None = None) -> Guard:
        """One setting, whatever the budget.

        Raises:
            UserError: the setting is not in the knob space.
        """
        return cls(FixedPolicy(knobs), space, (space.index(knobs),), profile)

    def only(self, choices: Iterable[int]) -> Guard:
        """The same guard over fewer settings."""
        return replace(self, choices=tuple(sorted(choices)))

    def wants_glance(self, request: Request, elapsed_ms: float) -> bool:
        """Whether the policy glances and has something to choose, after `elapsed_ms` of opening the picture."""
        if request.budget_ms is None or not self._glances:
            return False
        left_ms = self._left_ms(request.budget_ms, elapsed_ms, glanced=False)
        return self._is_open(self._fitting(left_ms, glanced=False))

    def choose_tier(
        self, request: Request, image_size: tuple[int, int] | None, elapsed_ms: float, glance: Any = None
    ) -> TierChoice:
        """The tier, after `elapsed_ms` of opening the picture and of encoding the glance, if there is one.

        `glance` is (1, G, D) the projected tokens of the global crop.
        """
        budget_ms = request.budget_ms
        if budget_ms is None:
            return TierChoice(self._unbounded.tier, Question(text=request.question, choices=()), None)
        left_ms = self._left_ms(budget_ms, elapsed_ms, glanced=glance is not None)
        allowed = self._fitting(left_ms, glanced=glance is not None)
        feasible = None if self.profile is None else bool(allowed)
        choices = allowed or (self._cheapest,)
        question = Question(
            text=request.question,
            choices=choices,
            image_size=image_size,
            budget_ms=left_ms,
            style=request.style,
            glance=glance,
        )
        is_open = self._is_open(choices)
        if self._at_once is not None:
            wanted = self._at_once.choose_setting(question, left_ms) if is_open else choices[0]
            return TierChoice(lower_tier(self.space, wanted.tier, choices), question, feasible, wanted)
        tier = self.policy.choose_tier(question, left_ms) if is_open else choices[0].tier
        return TierChoice(lower_tier(self.space, tier, choices), question, feasible)

    def choose_compute(self, request: Request, chosen: TierChoice, sight: Sight, elapsed_ms: float) -> Choice:
        """Top-k and depth, after `elapsed_ms` of looking at the picture.

        Where the whole setting was chosen at once, it runs unless it no longer fits.
        """
        budget_ms = request.budget_ms
        if budget_ms is None:
            return self._choice(self._unbounded, None, elapsed_ms, FIXED)
        left_ms = budget_ms - elapsed_ms - (self.control_ms if self.second_ms is None else self.second_ms)
        bounds = self._remainders[chosen.tier]
        choices = self._within(bounds, left_ms)
        feasible = chosen.feasible and bool(choices)
        choices = choices or (bounds[0][0],)
        knobs = choices[0]
        if len(choices) > 1:
            wanted = chosen.wanted or self._ask(chosen, choices, sight, left_ms)
            knobs = nearest_below(wanted, choices)
        return self._choice(knobs, feasible, elapsed_ms, self.policy.name)

    def observe(self, answer: Answer, opened_ms: float) -> None:
        """Learn from a whole answer, whose picture took `opened_ms` to open, what bounds are worth by now."""
        if self.margin is None or self.profile is None or answer.finish_reason in ("deadline", "cancelled"):
            return
        took_ms = answer.timings_ms["total"] - opened_ms - answer.timings_ms["control"]
        self.margin.observe(took_ms, self._upper_ms(self.space.index(answer.knobs), glanced=self._glances))

    @cached_property
    def _at_once(self) -> ChoosesAtOnce | None:
        """The policy, if it chooses the whole setting first."""
        return self.policy if isinstance(self.policy, ChoosesAtOnce) else None

    @cached_property
    def _glances(self) -> bool:
        return needs_glance(self.policy)

    @cached_property
    def _totals(self) -> dict[bool, Bounds]:
        """Of the answers from the opened picture on, without and with a glance."""
        settings = self.space.settings
        return {
            glanced: tuple((settings[i], self._upper_ms(i, glanced=glanced)) for i in self.choices)
            for glanced in (False, True)
        }

    @cached_property
    def _remainders(self) -> dict[str, Bounds]:
        """Of prefill and decode, by tier."""
        upper_ms = (lambda _: -math.inf) if self.profile is None else self.profile.upper_remainder_ms
        rows = [(self.space.settings[i], upper_ms(i)) for i in self.choices]
        return {tier: tuple(row for row in rows if row[0].tier == tier) for tier in self.space.tiers}

    def _upper_ms(self, index: int, *, glanced: bool) -> float:
        """The calibrated bound on a setting's answer from the opened picture on; none where none is known."""
        if self.profile is None:
            return -math.inf
        split_ms = self.split_ms.get(self.space.settings[index].tier, 0.0) if glanced else 0.0
        return self.profile.upper_total_ms(index) - self.profile.open_ms + split_ms

    @property
    def _factor(self) -> float:
        return 1.0 if self.margin is None else self.margin.factor

    def _within(self, bounds: Bounds, left_ms: float) -> tuple[KnobConfig, ...]:
        """The settings whose bound, times the margin's factor, fits."""
        factor = self._factor
        return tuple([knobs for knobs, upper_ms in bounds if factor * upper_ms <= left_ms])

    def _ask(
        self, chosen: TierChoice, choices: tuple[KnobConfig, ...], sight: Sight, left_ms: float
    ) -> KnobConfig:
        """What the policy wants to run at the chosen tier."""
        features = Features(question=chosen.question, choices=choices, sight=sight)
        top_k, num_blocks = self.policy.choose_compute(features, chosen.tier, left_ms)
        return KnobConfig(tier=chosen.tier, top_k=top_k, num_blocks=num_blocks)

    def _left_ms(self, budget_ms: float, elapsed_ms: float, *, glanced: bool) -> float:
        """What is left for a whole answer, of which opening the picture and the glance are parts."""
        left_ms, profile = budget_ms - elapsed_ms - self.control_ms, self.profile
        if profile is None:
            return left_ms
        # The table holds an ordinary picture's opening, and an ordinary look at the lowest tier.
        return left_ms + (min(elapsed_ms, profile.p50_prefix_ms(0)) if glanced else profile.open_ms)

    def _fitting(self, left_ms: float, *, glanced: bool) -> tuple[KnobConfig, ...]:
        """The settings whose upper total fits, with what a glance adds to it."""
        opened_ms = 0.0 if self.profile is None else self.profile.open_ms  # which `_left_ms` gave back
        return self._within(self._totals[glanced], left_ms - opened_ms)

    def _is_open(self, choices: Sequence[KnobConfig]) -> bool:
        """Whether there is something to choose first: they are in index order, in which tiers are together."""
        if self._at_once is not None:
            return len(choices) > 1
        return bool(choices) and choices[0].tier != choices[-1].tier

    def _choice(self, knobs: KnobConfig, feasible: bool | None, elapsed_ms: float, policy: str) -> Choice:
        """The setting, with what has passed and what the rest is expected to take."""
        if self.profile is None:
            return Choice(knobs, feasible, None, 0.0, policy)
        profile, index = self.profile, self.space.index(knobs)
        predicted = Prediction(
            p50_ms=elapsed_ms + profile.p50_remainder_ms(index),
            upper_ms=elapsed_ms + self._factor * profile.upper_remainder_ms(index),
        )
        return Choice(knobs, feasible, predicted, profile.step_ms(index), policy)

    @cached_property
    def _unbounded(self) -> KnobConfig:
        """Without a budget: the model as trained, or the most that may run."""
        settings = [self.space.settings[i] for i in self.choices]
        return self.space.native if self.space.native in settings else settings[-1]

    @cached_property
    def _cheapest(self) -> KnobConfig:
        profile = self.profile
        index = self.choices[0] if profile is None else min(self.choices, key=profile.p50_total_ms)
        return self.space.settings[index]


def lower_tier(space: KnobSpace, wanted: str, choices: Sequence[KnobConfig]) -> str:
    """The wanted tier if a choice has it, else the next lower one that has, else the lowest."""
    limit = space.tiers.index(wanted) if wanted in space.tiers else 0
    for tier in reversed(space.tiers[: limit + 1]):
        if any(knobs.tier == tier for knobs in choices):
            return tier
    return choices[0].tier


def nearest_below(wanted: KnobConfig, choices: Sequence[KnobConfig]) -> KnobConfig:
    """The wanted setting if it is allowed, else the largest that exceeds it in no knob, else the cheapest."""
    below = [k for k in choices if k.top_k <= wanted.top_k and k.num_blocks <= wanted.num_blocks]
    return max(below, key=lambda k: (k.num_blocks, k.top_k)) if below else choices[0]


def measure_control_ms(
    policy: Policy, space: KnobSpace, glance: Callable[[], Any] | None = None
) -> tuple[float, float]:
    """The times that the policy's first and second choice keep in most of a few tries, over the whole knob space.

    `glance` projects a glance, which belongs to the first choice; a policy that chooses at once has no second one.
    """
    times_ms, crowd = [], np.zeros(CROWD_BYTES, dtype=np.uint8)
    for number in range(CONTROL_REPEATS):
        # Never the same: a policy may remember the last question and the last budget.
        text, budget_ms = f"what does sign {number} say?", 1e9 + number
        crowd += 1
        start_ms = now_ms()
        seen = glance() if glance is not None and needs_glance(policy) else None
        question = Question(text=text, choices=space.settings, image_size=(336, 448), glance=seen)
        if isinstance(policy, ChoosesAtOnce):
            policy.choose_setting(question, budget_ms)
            times_ms.append((now_ms() - start_ms, 0.0))
            continue
        tier = policy.choose_tier(question, budget_ms)
        middle_ms = now_ms()
        choices = tuple(knobs for knobs in space if knobs.tier == tier) or space.settings
        features = Features(question=question, choices=choices, sight=Sight(None, 0, 0))
        policy.choose_compute(features, tier, budget_ms)
        times_ms.append((middle_ms - start_ms, now_ms() - middle_ms))
    first_ms, second_ms = np.quantile(times_ms[1:], CONTROL_SHARE, axis=0, method="higher").tolist()
    return first_ms, second_ms
