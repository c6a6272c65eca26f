"""The guard around every policy: it removes the settings that are not expected to end within the budget.

It guards both choices, each with its own calibrated table: upper bounds of totals for the tier, and of remainders
for top-k and depth, where the rest of the budget is read from the clock. If nothing fits, it runs the cheapest
setting and says so. Of the settings that fit, `select.best` takes the one that the policy scores highest.

A policy that glances makes its first choice later. The tables include cutting and encoding the glance, since every
tier needs the global crop. So only the excess over an ordinary look at the lowest tier is charged, plus the two
measured costs that the tables lack: the policy's own time, and the cost of encoding in two passes.

After every answer the guard adapts its bounds (the margin) if the machine is slower or faster than calibrated, and
at the second choice by how long the picture took.

Shapes: `K` settings of the knob space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from tempovlm.control.joining import UNKNOWN_MS, Need, in_turns
from tempovlm.control.margin import OnlineMargin
from tempovlm.control.policies import FIXED, FixedPolicy
from tempovlm.control.policy import Policy, Question, Sight
from tempovlm.control.price import FREE, ROUNDING, Envelope, LanePrice
from tempovlm.control.select import Floats, Mask, best
from tempovlm.core.checks import wrong_argument
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobConfig, KnobSpace
from tempovlm.core.request import STAGES, Answer, Prediction, Request
from tempovlm.core.units import now_ms
from tempovlm.latency.profile import MOST_OUTPUTS, LatencyProfile, OutputLength, Sharing
from tempovlm.latency.remembered import remembered

CONTROL_REPEATS = 20
"""Number of measurements of a policy's own time."""

CONTROL_SHARE = 0.9
"""Quantile of those times that is charged; the maximum is usually an interruption."""

CROWD_BYTES = 1 << 25
"""Bytes touched before each timing to evict the CPU caches, as streaming the model's weights would."""

ORDINARY, PICTURE, AMPLE_MS = "what is in the picture?", (336, 448), 1e9
"""A question, the height and width of its picture, and a budget that everything fits."""

QUICK_MS, DOOR_MS = 0.5, 1.0
"""A second choice that takes longer than `QUICK_MS` is not rehearsed: the device would be done before, and wait. A
first one that takes longer than `DOOR_MS` is not made at the door, to tell what a request may gain."""


@dataclass(frozen=True, slots=True)
class TierChoice:
    """The first choice.

    Attributes:
        feasible: None without a budget or without a calibration.
        index: the best setting; its tier is the choice.
        scores: (K,) from the policy; None if it was not asked.
        is_worth_it: whether some setting gains more than its lane time is worth to those who wait.
    """

    tier: str
    question: Question
    feasible: bool | None
    index: int
    scores: Floats | None = None
    is_worth_it: bool = True


@dataclass(frozen=True, slots=True)
class Choice:
    """The whole setting, its predicted time, and the name of the policy that chose it.

    Attributes:
        predicted: for the whole answer; None without a calibration. step_ms: a decode step; 0 without one.
        margin: the factor on calibrated bounds, without what this answer's picture tells.
    """

    knobs: KnobConfig
    feasible: bool | None
    predicted: Prediction | None
    step_ms: float
    policy: str
    margin: float = 1.0


@dataclass(frozen=True, slots=True)
class Usual:
    """An ordinary question: what the time of those who wait is priced by, whatever a request restricts.

    Attributes:
        scores: (K,) mean accuracies. envelope: accuracy over expected lane time at all settings and usual lengths.
    """

    scores: Floats
    envelope: Envelope


@dataclass(frozen=True)
class Guard:
    """Wraps a policy; keeps no state of requests but the margin.

    Tables are arrays that are made once: at a choice the CPU caches hold the model's weights, so touching memory
    costs several times what a repeated measurement suggests.

    Attributes:
        choices: indices of the settings that may run, ascending.
        profile: None on a machine that is not calibrated: then no setting is removed and no time predicted.
        control_ms: the policy's measured time for both choices, which calibration does not include.
        second_ms: the second choice's part of it; None charges all of it at both choices.
        split_ms: by tier, extra time to encode the global crop first and the tiles later.
        margin: the factor on the bounds, learned from answers; None keeps the calibrated bounds.
        crowd: a further factor for answers among others, learned from them; None as `margin`.
        is_among: whether it decides about answers among others. spread: a calibrated factor on their bounds.
        usual: what an ordinary question gains; None where scores are not accuracies, or times unknown: then lane
            time has no price.
    """

    policy: Policy
    space: KnobSpace
    choices: tuple[int, ...]
    profile: LatencyProfile | None = None
    control_ms: float = 0.0
    second_ms: float | None = None
    split_ms: Mapping[str, float] = field(default_factory=dict)
    margin: OnlineMargin | None = None
    crowd: OnlineMargin | None = None
    is_among: bool = False
    spread: float = 1.0
    usual: Usual | None = None

    @classmethod
    def around(
        cls,
        policy: Policy,
        space: KnobSpace,
        profile: LatencyProfile | None,
        glance: Callable[[], Any] | None = None,
        split_ms: Mapping[str, float] | None = None,
    ) -> Guard:
        """Guard a policy over the whole knob space; measures the policy's own time.

        Args:
            policy: the policy to guard.
            space: the settings.
            profile: of this machine.
            glance: function that projects a glance, if the policy needs one; timed with the policy.
            split_ms: by tier, extra time to encode in two passes.
        """
        everything = tuple(range(len(space)))
        first_ms, second_ms = measure_control_ms(policy, space, glance)
        own_ms = first_ms + second_ms
        margins = OnlineMargin(), OnlineMargin()
        guard = cls(policy, space, everything, profile, own_ms, second_ms, split_ms or {}, *margins)
        if profile is not None and policy.scale == "accuracy":
            scores = policy.usual if policy.usual is not None else _ordinary(policy, glance)
            guard = replace(guard, usual=Usual(scores, Envelope.of(scores, guard._costs_ms)))
        return guard._with_tables()

    def _with_tables(self) -> Guard:
        """Return this guard once its tables are made; otherwise the first answer of a process would pay for it."""
        _ = self._totals_ms, self._remainders_ms, self._cheapest
        if self.profile is not None:
            _ = self.profile.usual_picture
            self.profile.p50_prefix_ms(0)
            self._choice(self._cheapest, None, 0.0, "", self._factor)
        return self

    def budgets_ms(self) -> Floats:
        """(K,) the least budget that lets each setting run, where the picture opens in the usual time."""
        opened_ms = 0.0 if self.profile is None else self.profile.open_ms
        return self._factor * self._totals_ms[self.policy.sees_glance] + opened_ms + self.control_ms

    @classmethod
    def fixed(cls, knobs: KnobConfig, space: KnobSpace, profile: LatencyProfile | None = None) -> Guard:
        """Return a guard that always runs one setting.

        Raises:
            UserError: the setting is not in the knob space.
        """
        return cls(FixedPolicy(knobs, space), space, (space.index(knobs),), profile)._with_tables()

    def for_lengths(self, output: OutputLength) -> Guard:
        """The same guard, with the same margin, of requests whose answers have other lengths."""
        profile = self.profile
        if profile is None or output == profile.output:
            return self
        make = lambda: replace(self, profile=profile.for_lengths(output))._with_tables()  # noqa: E731
        return remembered(self._others, output, make, MOST_OUTPUTS)

    def has_lengths(self, output: OutputLength) -> bool:
        """Whether `for_lengths` has nothing to compute."""
        return self.profile is None or output == self.profile.output or output in self._others

    @cached_property
    def _others(self) -> dict[OutputLength, Guard]:
        return {}

    def among(self, in_flight: int, turns: int = 1) -> Guard | None:
        """Return the guard of answers among `in_flight`, `turns` of which come at once; None if not measured."""
        sharing = None if self.profile is None else self.profile.sharing(in_flight)
        if self.profile is None or sharing is None or sharing.most < in_flight:
            return None
        sharing = in_turns(sharing, turns)
        if sharing not in self._crowds:
            profile = self.profile.in_company(sharing)
            guard = replace(self, profile=profile, is_among=True, spread=sharing.spread)
            self._crowds[sharing] = guard._with_tables()
        return self._crowds[sharing]

    @cached_property
    def _crowds(self) -> dict[Sharing, Guard]:
        return {}

    def need(self, knobs: KnobConfig, max_new_tokens: int, deadline_ms: float) -> Need:
        """Return what an answer at a setting needs among others, by its times alone, at the margins of now."""
        if self.profile is None:
            return Need(UNKNOWN_MS, UNKNOWN_MS, max_new_tokens - 1, deadline_ms)
        index, crowding = self.space.index(knobs), 1.0 if self.crowd is None else self.crowd.factor
        times_ms = self.profile.p50_reading_ms(index), self.profile.step_ms(index)
        steps = min(max_new_tokens, self.profile.output.upper) - 1
        return Need(*times_ms, steps, deadline_ms, self._factor, crowding)

    def only(self, choices: Iterable[int]) -> Guard:
        """Return the same guard over fewer settings."""
        return replace(self, choices=tuple(sorted(choices)))

    def wants_glance(self, request: Request, elapsed_ms: float) -> bool:
        """Whether the policy needs a glance and more than one choice is left, `elapsed_ms` after acceptance."""
        if request.budget_ms is None or not self.policy.sees_glance:
            return False
        fits = self._fitting(self._left_ms(request.budget_ms, elapsed_ms, glanced=False), 0)
        return self._is_open(*_ends(fits))

    def pools(self, request: Request) -> bool:
        """Whether the second choice needs the picture's pooled tokens."""
        return self.policy.sees_picture and request.budget_ms is not None and len(self.choices) > 1

    def rehearse(self, request: Request, chosen: TierChoice) -> None:
        """Make the second choice without a picture and forget it, while a device still encodes.

        What the policy remembers of the question is there afterwards, and the processor's caches, full of what
        started the device, hold the choice's code and weights: the same work takes a third of the time then.
        """
        if self.pools(request) and self.second_ms is not None and self.second_ms <= QUICK_MS:
            self.choose_compute(request, chosen, Sight(chosen.tier, None, 0, 0), 0.0)

    @property
    def has_price(self) -> bool:
        """Whether lane time has a price in accuracy, and there is something to choose by it."""
        return self.usual is not None and len(self.choices) > 1

    def worths(self, question: Question | None = None) -> tuple[Envelope, Envelope] | None:
        """Return what a request may gain, and what an ordinary question gains at all settings; None as `usual`.

        Both are accuracies over expected time, at the margin that holds now. The first one is of the settings that
        may run, by what the policy expects of the `question`, if it can tell at once.
        """
        if self.usual is None:
            return None
        scores = self.usual.scores
        first_ms = self.control_ms - (self.second_ms or 0.0)
        if question is not None and not self.policy.sees_glance and first_ms <= DOOR_MS:
            scores = self.policy.look(question, AMPLE_MS)
        own, usual = Envelope.of(scores, self._costs_ms), self.usual.envelope
        return own.stretched(self._factor), usual.stretched(self._factor)

    def choose_tier(
        self,
        request: Request,
        image_size: tuple[int, int] | None,
        elapsed_ms: float,
        glance: Any = None,
        lane: LanePrice = FREE,
    ) -> TierChoice:
        """Choose the tier with the picture opened and any glance taken.

        Args:
            request: the request.
            image_size: height and width in pixels; None without a picture.
            elapsed_ms: time since acceptance.
            glance: (1, G, D) the projected tokens of the global crop.
            lane: the price of lane time, on top of the request's own.

        Raises:
            UserError: the request has a price, and the policy's scores are not accuracies.
        """
        budget_ms = request.budget_ms
        if budget_ms is None:
            return self._tier_choice(self._unbounded, Question(text=request.question), None)
        self._check_price(request)
        left_ms = self._left_ms(budget_ms, elapsed_ms, glanced=glance is not None)
        fits = self._fitting(left_ms, int(glance is not None))
        first, last = _ends(fits)
        feasible = None if self.profile is None else first >= 0
        question = Question(
            text=request.question, image_size=image_size, left_ms=left_ms, style=request.style, glance=glance
        )
        if not self._is_open(first, last):
            return self._tier_choice(first if first >= 0 else self._cheapest, question, feasible)
        scores = self.policy.look(question, left_ms)
        lane_per_ms = self._lane_per_ms(lane)
        price_per_ms = request.price_per_ms + lane_per_ms
        index = int(best(scores, fits, self._costs_ms, price_per_ms, self.policy.tie))
        chosen = self._tier_choice(index, question, feasible, scores)
        if lane_per_ms and lane_per_ms > (1 + ROUNDING) * float((scores / self._costs_ms).max()):
            return replace(chosen, is_worth_it=False)
        return chosen

    def choose_compute(
        self,
        request: Request,
        chosen: TierChoice,
        sight: Sight,
        elapsed_ms: float,
        picture_ms: float | None = None,
        lane: LanePrice = FREE,
    ) -> Choice:
        """Choose top-k and depth when the picture is encoded.

        Args:
            request: the request.
            chosen: the first choice.
            sight: the encoded picture.
            elapsed_ms: time since acceptance.
            picture_ms: time since the first choice, for the whole picture; None if it was seen in part before.
            lane: the price of lane time, on top of the request's own.
        """
        budget_ms, factor = request.budget_ms, self._rest_factor(chosen, picture_ms)
        if budget_ms is None:
            return self._choice(self._unbounded, None, elapsed_ms, FIXED, factor)
        left_ms = budget_ms - elapsed_ms - (self.control_ms if self.second_ms is None else self.second_ms)
        of_tier = self._of_tier[chosen.tier]
        fits = self._remainders_ms[of_tier] <= left_ms / factor
        first, last = _ends(fits)
        if first != last:
            scores = self._settled(chosen, sight, left_ms)[of_tier]
            price_per_ms = request.price_per_ms + self._lane_per_ms(lane)
            place = int(best(scores, fits, self._costs_ms[of_tier], price_per_ms, self.policy.tie))
        else:
            place = first if first >= 0 else int(self._costs_ms[of_tier].argmin())
        feasible = chosen.feasible and first >= 0
        return self._choice(of_tier.start + place, feasible, elapsed_ms, self.policy.name, factor)

    def least_ms(self, tier: TierChoice | None = None) -> float:
        """Return the cheapest setting's upper bound: of a whole answer, or of the rest once a tier was seen."""
        if tier is None:
            return self.control_ms + self._factor * float(self._totals_ms[0].min())
        own_ms = self.control_ms if self.second_ms is None else self.second_ms
        return own_ms + self._factor * float(self._remainders_ms[self._of_tier[tier.tier]].min())

    @property
    def opening_ms(self) -> float:
        """The usual time to open a picture, which is no part of `least_ms` and `expected_ms`; 0 if unknown."""
        return 0.0 if self.profile is None else self.profile.open_ms

    def expected_ms(self) -> float:
        """Return the cheapest setting's expected time of a whole answer, at the margin that holds now."""
        if self.profile is None:
            return self.least_ms()
        return self.control_ms + self._factor * (float(self._costs_ms.min()) - self.profile.open_ms)

    def least_of(self, tier: TierChoice) -> Prediction:
        """Return the least time of an answer at a tier, from the opened picture on: if others want the rest."""
        assert self.profile is not None
        of_tier = self._of_tier[tier.tier]
        expected_ms = float(self._costs_ms[of_tier].min()) - self.profile.open_ms
        bound_ms = float(self._totals_ms[self.policy.sees_glance][of_tier].min())
        return Prediction(p50_ms=self._factor * expected_ms, upper_ms=self._factor * bound_ms)

    def calibrated_ms(self) -> float:
        """Return the cheapest setting's bound of a whole answer as calibrated, without the margin."""
        return self.control_ms + self.spread * float(self._totals_ms[0].min())

    def choice_of(self, tier: TierChoice | None) -> Choice:
        """A request's setting that ended before it was chosen: the first choice's, else the cheapest."""
        index = self._cheapest if tier is None else tier.index
        feasible = None if tier is None else tier.feasible
        return Choice(self.space.settings[index], feasible, None, 0.0, self.policy.name, self._factor)

    def observe(self, answer: Answer, opened_ms: float) -> None:
        """Learn from an answer, whose picture took `opened_ms` to open, what bounds are worth by now.

        One that was cut at its deadline although its setting was expected to fit counts as long as it had time:
        without it, a machine on which the slow answers are cut would seem to be as fast as ever.
        """
        is_cut = answer.stopped_at is not None
        is_late = answer.finish_reason == "deadline" and answer.budget_feasible
        if self.margin is None or self.profile is None or (is_cut and not is_late):
            return
        times_ms, profile, index = answer.timings_ms, self.profile, self.space.index(answer.knobs)
        took_ms = sum(times_ms[stage] for stage in STAGES if stage not in ("queue", "control")) - opened_ms
        longer_ms = (answer.num_output_tokens - profile.output.mean) * profile.step_ms(index)
        rest_ms = times_ms["prefill"] + times_ms["decode"]
        halves = [] if is_cut else [rest_ms / float(self._remainders_ms[index])]
        if not is_cut and not self.policy.sees_glance:
            halves.append(self._picture_ratio(index, took_ms - rest_ms) / profile.usual_picture)
        if is_cut and answer.budget_ms is not None:
            waited_ms = times_ms["queue"] + times_ms["control"] + opened_ms
            took_ms, longer_ms = max(took_ms, answer.budget_ms - waited_ms), max(0.0, longer_ms)
        self.margin.observe(
            took_ms,
            float(self._totals_ms[self.policy.sees_glance][index]),
            profile.p50_total_ms(index) - profile.open_ms + longer_ms,
            max(halves, default=0.0),
        )

    def observe_among(self, took_ms: float, calibrated_ms: float, spread: float) -> None:
        """Learn from an answer among others, which `spread` times the time of calibrated needs should cover.

        One that had its last token before the last of the others joined tells nothing.
        """
        if self.crowd is not None and took_ms > 0 and calibrated_ms > 0:
            self.crowd.observe(took_ms, spread * calibrated_ms, calibrated_ms)

    def _settled(self, chosen: TierChoice, sight: Sight, left_ms: float) -> Floats:
        """Return the policy's scores (K,) for the second choice."""
        policy = self.policy
        if policy.sees_picture or (chosen.scores is None and not policy.sees_glance):
            return policy.settle(chosen.question, sight, left_ms)
        # If only one setting was open, a glancing policy got no glance; then the first choice stays.
        return np.eye(len(self.space))[chosen.index] if chosen.scores is None else chosen.scores

    def _lane_per_ms(self, lane: LanePrice) -> float:
        """Return the price of lane time; 0 where it cannot be weighed against the policy's scores."""
        return 0.0 if self.usual is None else lane.per_ms(self.usual.envelope, self._factor)

    def _check_price(self, request: Request) -> None:
        if request.price_per_ms and len(self.choices) > 1 and self.policy.scale != "accuracy":
            raise no_price(self.policy.name, request.price_per_ms)

    def _tier_choice(
        self, index: int, question: Question, feasible: bool | None, scores: Floats | None = None
    ) -> TierChoice:
        return TierChoice(self.space.settings[index].tier, question, feasible, index, scores)

    @cached_property
    def _of_tier(self) -> dict[str, slice]:
        """The places of each tier's settings."""
        count = self._per_tier
        return {tier: slice(i * count, (i + 1) * count) for i, tier in enumerate(self.space.tiers)}

    @cached_property
    def _per_tier(self) -> int:
        return len(self.space) // len(self.space.tiers)

    @cached_property
    def _costs_ms(self) -> Floats:
        """(K,) medians of whole answers, by which ties are broken; without a profile, places in the space."""
        return self._table(float if self.profile is None else self.profile.p50_total_ms)

    @cached_property
    def _totals_ms(self) -> tuple[Floats, Floats]:
        """(K,) bounds on answers from the opened picture on, without and with a glance; none without a profile."""
        if self.profile is None:
            unbounded_ms = self._table(lambda _: -np.inf)
            return unbounded_ms, unbounded_ms
        upper_ms = self._table(self.profile.upper_total_ms) - self.profile.open_ms
        if not self.split_ms:
            return upper_ms, upper_ms
        return upper_ms, upper_ms + self._table(lambda i: self.split_ms.get(self.space.settings[i].tier, 0.0))

    @cached_property
    def _remainders_ms(self) -> Floats:
        """(K,) bounds on prefill and decode; none without a profile."""
        return self._table((lambda _: -np.inf) if self.profile is None else self.profile.upper_remainder_ms)

    def _table(self, of_setting: Callable[[int], float]) -> Floats:
        """(K,) a value of every setting that may run; infinite for the others, which fit nothing."""
        table = np.full(len(self.space), np.inf)
        table[list(self.choices)] = [of_setting(i) for i in self.choices]
        return table

    @property
    def _factor(self) -> float:
        return self.spread * self._crowding * (1.0 if self.margin is None else self.margin.factor)

    @property
    def _crowding(self) -> float:
        """Return what answers among others need more than was calibrated of them."""
        return self.crowd.factor if self.is_among and self.crowd is not None else 1.0

    @property
    def middle(self) -> float:
        """The factor on medians that answers among others taught, upon the margin that they learn beside."""
        if not self.is_among or self.crowd is None:
            return 1.0
        return self.crowd.middle * (1.0 if self.margin is None else self.margin.factor)

    def _rest_factor(self, chosen: TierChoice, picture_ms: float | None) -> float:
        """Return the factor on remainders, once a picture took `picture_ms`."""
        if self.margin is None or self.profile is None or picture_ms is None:
            return self._factor
        ratio = self._picture_ratio(chosen.index, picture_ms)
        if ratio <= 0:
            return self._factor
        return self.spread * self._crowding * self.margin.rest_factor(ratio, self.profile.usual_picture)

    def _picture_ratio(self, index: int, picture_ms: float) -> float:
        """Return the time from the opened picture to the second choice over its median; 0 where there is none."""
        assert self.profile is not None
        usual_ms = self.profile.p50_picture_ms(index)
        return picture_ms / usual_ms if usual_ms > 0 else 0.0

    def _left_ms(self, budget_ms: float, elapsed_ms: float, *, glanced: bool) -> float:
        """Return the rest of the budget for a whole answer, which includes opening the picture and the glance."""
        left_ms, profile = budget_ms - elapsed_ms - self.control_ms, self.profile
        if profile is None:
            return left_ms
        # The table includes an ordinary picture's opening and an ordinary look at the lowest tier.
        return left_ms + (min(elapsed_ms, profile.p50_prefix_ms(0)) if glanced else profile.open_ms)

    def _fitting(self, left_ms: float, glances: int) -> Mask:
        """(K,) the settings whose upper total, with that of 0 or 1 glances, fits."""
        opened_ms = 0.0 if self.profile is None else self.profile.open_ms  # which `_left_ms` gave back
        return self._totals_ms[glances] <= (left_ms - opened_ms) / self._factor

    def _is_open(self, first: int, last: int) -> bool:
        """Whether there is something to choose first, from the first to the last setting that fits.

        A setting, or for a policy that settles later, a tier.
        """
        if not self.policy.sees_picture:
            return first != last
        return first // self._per_tier != last // self._per_tier

    def _choice(self, index: int, feasible: bool | None, elapsed_ms: float, policy: str, factor: float) -> Choice:
        """Return the whole setting, with the elapsed time and the predicted rest, whose bound has a `factor`."""
        knobs, profile = self.space.settings[index], self.profile
        if profile is None:
            return Choice(knobs, feasible, None, 0.0, policy)
        predicted = Prediction(
            p50_ms=elapsed_ms + self.middle * profile.p50_remainder_ms(index),
            upper_ms=elapsed_ms + factor * profile.upper_remainder_ms(index),
        )
        return Choice(knobs, feasible, predicted, profile.step_ms(index), policy, self._factor)

    @cached_property
    def _unbounded(self) -> int:
        """Return the setting without a budget: the model as trained, or the largest that may run."""
        native = self.space.index(self.space.native)
        return native if native in self.choices else self.choices[-1]

    @cached_property
    def _cheapest(self) -> int:
        return int(self._costs_ms.argmin())


def _ends(fits: Mask) -> tuple[int, int]:
    """The first and the last place that fits; -1 and -1 where none does. A search of bytes starts soonest."""
    marks = fits.tobytes()
    return marks.find(1), marks.rfind(1)


def _ordinary(policy: Policy, glance: Callable[[], Any] | None) -> Floats:
    """(K,) a policy's scores of an ordinary question."""
    seen = glance() if glance is not None and policy.sees_glance else None
    return policy.look(Question(text=ORDINARY, image_size=PICTURE, left_ms=AMPLE_MS, glance=seen), AMPLE_MS)


def no_price(policy: str, price_per_ms: float, name: str = "price_per_ms") -> UserError:
    """Return the error that a policy's scores cannot be weighed against time, which an argument prices."""
    return wrong_argument(
        name,
        price_per_ms,
        f"policy {policy} scores settings by logits, which have no price in accuracy; give 0, or a policy that "
        "predicts accuracy: table, nearest neighbours, LinUCB or a value network",
    )


def measure_control_ms(
    policy: Policy, space: KnobSpace, glance: Callable[[], Any] | None = None
) -> tuple[float, float]:
    """Measure the time of a policy's first and second scoring: a high quantile of a few tries.

    `glance` projects a glance, which counts for the first one.
    """
    times_ms, crowd = [], np.zeros(CROWD_BYTES, dtype=np.uint8)
    for number in range(CONTROL_REPEATS):
        # Vary question and budget: a policy may remember the last ones.
        text, budget_ms = f"what does sign {number} say?", AMPLE_MS + number
        crowd += 1
        start_ms = now_ms()
        seen = glance() if glance is not None and policy.sees_glance else None
        question = Question(text=text, image_size=PICTURE, left_ms=budget_ms, glance=seen)
        scores = policy.look(question, budget_ms)
        middle_ms = end_ms = now_ms()
        if policy.sees_picture:
            tier = space.settings[int(scores.argmax())].tier
            policy.settle(question, Sight(tier, None, 0, 0), budget_ms)
            end_ms = now_ms()
        times_ms.append((middle_ms - start_ms, end_ms - middle_ms))
    first_ms, second_ms = np.quantile(times_ms[1:], CONTROL_SHARE, axis=0, method="higher").tolist()
    return first_ms, second_ms
