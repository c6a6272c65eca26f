"""One request among others: what its caller prepares, and what the thread that feeds the device adds to it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from tempovlm.control.guard import Choice, Guard, TierChoice
from tempovlm.control.joining import Forecast, Need
from tempovlm.control.policy import Sight
from tempovlm.control.price import ROUNDING
from tempovlm.core.plan import Plan
from tempovlm.core.request import Answer, Prediction, Request
from tempovlm.core.units import now_ms
from tempovlm.engine.company.ahead import Opened
from tempovlm.engine.sampling import sampler_for
from tempovlm.engine.transcript import Token, Transcript
from tempovlm.engine.watch import Watch
from tempovlm.engine.work import build_answer, image_size
from tempovlm.latency.clock import QUEUE, Lap, Reading

LEAST = 1 + ROUNDING
"""Factor on a least time that is kept, so that what needs it fits."""

if TYPE_CHECKING:
    from tempovlm.engine.engine import Engine
    from tempovlm.latency.profile import LatencyProfile


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A request, and who wants its answer.

    Attributes:
        guard: decides about it. accepted_ms: when its clock began.
        cancel: says True where the answer is not wanted. on_token: gets its tokens as they come; returns at once.
        rest: those of its batch that come after it, with later deadlines. ended: called when its answer is there.
    """

    request: Request
    guard: Guard
    accepted_ms: float
    cancel: Callable[[], bool] | None = None
    on_token: Callable[[Token], object] | None = None
    rest: tuple[Asked, ...] = ()
    ended: Callable[[], object] | None = None

    @property
    def deadline_ms(self) -> float:
        """When it must have ended; infinite without a budget."""
        budget_ms = self.request.budget_ms
        return math.inf if budget_ms is None else self.accepted_ms + budget_ms

    @property
    def is_late(self) -> bool:
        """Whether its deadline has passed."""
        return now_ms() >= self.deadline_ms

    def can_begin(self, at_ms: float) -> bool:
        """Whether it can still be in time if it begins then, at the least time that an answer alone takes."""
        return at_ms + self.guard.least_ms() <= self.deadline_ms


@dataclass(frozen=True, slots=True)
class Outlook:
    """Decides about a request that joins others, by how long it waits for them and who comes with it.

    Attributes:
        guard: decides about it among others. ahead_ms: time that it waits for them; 0 if unknown.
        sharing: decides while others of its batch are still to come, who get as much; None if none are.
        common_ms: the time that they have together, once it waits no more.
    """

    guard: Guard
    ahead_ms: float = 0.0
    sharing: Guard | None = None
    common_ms: float = math.inf

    def tier(self, request: Request, size: tuple[int, int] | None, passed_ms: float) -> TierChoice:
        """Choose the tier for a picture of a size (height, width), with its opening and waiting passed."""
        budget_ms, guard = request.budget_ms, self.guard
        if self.sharing is not None and budget_ms is not None:
            tier = self.sharing.choose_tier(request, size, budget_ms - self.common_ms)
            if tier.feasible:
                return tier
            passed_ms = max(passed_ms, budget_ms - LEAST * guard.least_ms())  # as before those at the door
        return guard.choose_tier(request, size, passed_ms)

    def compute(self, request: Request, tier: TierChoice, passed_ms: float, sight: Sight | None = None) -> Choice:
        """Choose top-k and depth when the picture is encoded, or before, without a `sight`."""
        budget_ms, guard, kept_ms = request.budget_ms, self.guard, passed_ms
        if self.sharing is not None and budget_ms is not None:
            past_ms = budget_ms - self.common_ms
            choice = choose_among(self.sharing, request, tier, past_ms, sight)
            if choice.feasible:
                return shifted(choice, passed_ms - past_ms)
            least_ms = guard.least_ms(tier) + (picture_ms(guard, request, tier) if sight is None else 0.0)
            kept_ms = max(passed_ms, budget_ms - LEAST * least_ms)
        return shifted(choose_among(guard, request, tier, kept_ms, sight), passed_ms - kept_ms)


class Member:
    """A request that is answered with others.

    It is made in its caller's thread, where the picture is opened and cut and the prompt written, while the device
    works for others. A policy that sees the picture chooses top-k and depth when it is encoded; until then what it
    would choose without it stands for that.

    Attributes:
        asked: the request, and who wants its answer.
        tier: the first choice. plan: of its setting.
        looks: whether it chooses again when its picture is encoded.
        ready: its crops and prompt. transcript: its tokens so far. sample: chooses them.
    """

    def __init__(
        self,
        engine: Engine,
        asked: Asked,
        turn: threading.Semaphore,
        outlook: Callable[[Asked], Outlook],
        opened: Opened | None = None,
    ) -> None:
        """Prepare a request; all but opening the picture, unless it is `opened`, in its `turn`.

        The `outlook` says who decides about it among others, and how long it waits for them.

        Raises:
            UserError: the picture cannot be read, or the prompt is too long.
        """
        request, accepted_ms = asked.request, asked.accepted_ms
        run, start_ms = engine.runner, now_ms()
        image = run.open(request) if opened is None else opened.image
        opening_ms = now_ms() - start_ms if opened is None else opened.took_ms
        with turn:
            begun_ms = now_ms()
            view = outlook(asked)
            passed_ms = 0.0 if view.guard.profile is None else begun_ms - accepted_ms + view.ahead_ms
            self.tier = view.tier(request, image_size(image), passed_ms)
            self._choice = view.compute(request, self.tier, passed_ms)
            chosen_ms = now_ms()
            self.ready = run.prepare(image, self.tier.tier, request)
            ready_ms = now_ms()
        self.asked, self.request, self.accepted_ms = asked, request, accepted_ms
        self._engine, self._done = engine, threading.Event()
        self.plan: Plan = engine.plan(self._choice.knobs)
        self.looks = asked.guard.pools(request)
        self._need = self._need_of(self._choice)
        self.transcript, self.sample = Transcript(request, run.tokenizer), sampler_for(request, run.device)
        self._watch = Watch(request, accepted_ms, engine.pieces, asked.cancel)
        self._stopped_at: str | None = None
        self._forecast: tuple[Forecast, int] | None = None
        self._error: BaseException | None = None
        self._total_ms = 0.0
        preparing_ms = opening_ms + (ready_ms - chosen_ms)
        self._laps = [Lap("preprocess", preparing_ms), Lap("control", chosen_ms - begun_ms)]
        self._prepared = None
        if run.device.type == "cuda":
            self._prepared = torch.cuda.current_stream(run.device).record_event()

    def __len__(self) -> int:
        """Tokens of the prompt."""
        return len(self.ready.prompt.tokens)

    @property
    def profile(self) -> LatencyProfile | None:
        """The calibration that its setting was chosen by."""
        return self.asked.guard.profile

    @property
    def has_deadline(self) -> bool:
        """Whether it has a budget."""
        return self.request.budget_ms is not None

    @property
    def is_done(self) -> bool:
        """Whether its answer is there, or it failed."""
        return self._done.is_set()

    @property
    def is_expected(self) -> bool:
        """Whether its setting fits the budget, if it has one."""
        return self._choice.feasible is not False

    @property
    def need(self) -> Need:
        """The rest of its work."""
        made = len(self.transcript.tokens)
        if not made:
            return self._need
        return replace(self._need, reading_ms=0.0, steps=max(self._need.steps + 1 - made, 0))

    def unread(self, choice: Choice | None = None) -> Need:
        """Return what is left of a choice, or of its own, when its picture is encoded."""
        choice, guard = choice or self._choice, self.asked.guard
        need = self._need_of(choice)
        if guard.profile is None:
            return need
        seeing_ms = guard.profile.p50_picture_ms(guard.space.index(choice.knobs))
        return replace(need, reading_ms=max(0.0, need.reading_ms - seeing_ms))

    def settle(self, choice: Choice | None, took_ms: float) -> None:
        """Run another choice, if there is one, now that its picture is encoded; choosing took so long."""
        self._laps.append(Lap("control", took_ms))
        self._choice = choice or self._choice
        self._need, self.plan = self.unread(), self._engine.plan(self._choice.knobs)

    def _need_of(self, choice: Choice) -> Need:
        asked = self.asked
        return asked.guard.need(choice.knobs, self.request.max_new_tokens, asked.deadline_ms)

    def expect(self, forecast: Forecast | None) -> None:
        """Remember when the answer is expected to end, now that another request has joined; None if unknown."""
        self._forecast = None if forecast is None else (forecast, len(self.transcript.tokens))

    def hand_over(self) -> None:
        """Let the current stream use what another one prepared."""
        if self._prepared is None:
            return
        stream = torch.cuda.current_stream(self._engine.device)
        stream.wait_event(self._prepared)
        if self.ready.crops is not None:
            self.ready.crops.record_stream(stream)

    def is_over(self, stage: str, needs_ms: float = 0.0) -> bool:
        """Whether the answer is whole, or ends before more work of a stage, which takes `needs_ms`."""
        if not self.transcript.finish:
            reason = self._watch.reason(needs_ms)
            if reason is not None:
                self.transcript.end(reason)
                self._stopped_at = stage
        return self.transcript.finish is not None

    def add(self, token: int) -> bool:
        """Add a token, and tell the caller of those that are final; return whether it was the last one.

        Raises:
            UserError: the token marks logits that are not numbers.
        """
        said = self.transcript.add(token)
        is_last = self.is_over("decode", self._choice.step_ms)
        if self.asked.on_token is not None:
            for one in (*said, *self.transcript.settled()):
                self.asked.on_token(one)
        return is_last

    def ends_unread(self) -> bool:
        """Whether the answer ends before its picture is encoded; then its caller wakes."""
        try:
            if self.is_over(QUEUE):
                self.finish(now_ms())
        except BaseException as error:  # noqa: BLE001 - the caller raises it
            self.fail(error)
        return self.is_done

    def spent(self, *readings: Reading) -> None:
        """Add the stages of readings that are the request's own; all other time it waits."""
        self._laps += [lap for reading in readings for lap in reading.laps if lap.stage != QUEUE]

    def stepped(self, step_ms: float) -> None:
        """Add the time from one token to the next, in which others may have joined."""
        self._laps.append(Lap("decode", step_ms))

    def finish(self, ended_ms: float) -> None:
        """The last token was read at `ended_ms`; wake the caller."""
        self._total_ms = ended_ms - self.accepted_ms
        self._learn(ended_ms)
        self._end()

    def _learn(self, ended_ms: float) -> None:
        """Let the guard learn how long the answer took since the last request joined.

        One that was cut at its deadline, although it was expected in time, counts too. One whose last token was
        made by then waited for nobody, and one without a deadline may have been put off for others.
        """
        is_late = self.transcript.finish == "deadline" and self._choice.feasible
        if self._forecast is None or not self.has_deadline or (self._stopped_at is not None and not is_late):
            return
        forecast, before = self._forecast
        made = len(self.transcript.tokens) - before
        if not made and not is_late:
            return
        calibrated_ms = forecast.expected_ms(made if before else max(made - 1, 0))
        self.asked.guard.observe_among(ended_ms - forecast.at_ms, calibrated_ms, forecast.spread)

    def fail(self, error: BaseException) -> None:
        """Wake a caller that waits by an error; what was prepared is freed here, not where that is caught."""
        if not self._done.is_set():
            self._error = error
            del self.ready, self._prepared
            self._end()

    def _end(self) -> None:
        self._done.set()
        if self.asked.ended is not None:
            self.asked.ended()

    def answer(self) -> Answer:
        """Wait for the last token, and return the answer.

        Raises:
            UserError: the model's logits are not numbers.
        """
        self._done.wait()
        if self._error is not None:
            raise self._error
        waited_ms = self._total_ms - sum(lap.duration_ms for lap in self._laps)
        reading = Reading((Lap(QUEUE, max(waited_ms, 0.0)), *self._laps), self._total_ms)
        engine, request, choice, ready = self._engine, self.request, self._choice, self.ready
        return build_answer(
            engine, request, choice, ready, self.transcript, reading, self.accepted_ms, self._stopped_at
        )


def choose_among(
    guard: Guard, request: Request, tier: TierChoice, elapsed_ms: float, sight: Sight | None = None
) -> Choice:
    """Choose top-k and depth; without a `sight` before the picture is encoded, with its usual time set aside."""
    if sight is not None:
        return guard.choose_compute(request, tier, sight, elapsed_ms)
    seeing_ms = picture_ms(guard, request, tier)
    choice = guard.choose_compute(request, tier, Sight(tier.tier, None, 0, 0), elapsed_ms + seeing_ms)
    if choice.predicted is None:
        return choice
    predicted = Prediction(
        p50_ms=choice.predicted.p50_ms + (guard.middle - 1) * seeing_ms,
        upper_ms=choice.predicted.upper_ms + (choice.margin - 1) * seeing_ms,
    )
    return replace(choice, predicted=predicted)


def picture_ms(guard: Guard, request: Request, tier: TierChoice) -> float:
    """Return the usual time from the opened picture to the second choice; 0 without a picture, or if unknown."""
    profile = guard.profile
    return 0.0 if profile is None or not request.images else profile.p50_picture_ms(tier.index)


def shifted(choice: Choice, by_ms: float) -> Choice:
    """Return the same choice, of which all times are later."""
    told = choice.predicted
    if told is None or not by_ms:
        return choice
    return replace(choice, predicted=Prediction(p50_ms=told.p50_ms + by_ms, upper_ms=told.upper_ms + by_ms))
