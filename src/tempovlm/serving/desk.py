"""Between HTTP and the model: admits or refuses a question, answers it in a thread, and cancels it.

A refusal is told from the picture's header, the queue and the latency profile; no pixel is decoded for it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tempovlm.control.forecast import Forecast
from tempovlm.control.guard import Guard
from tempovlm.control.policy import Question
from tempovlm.control.queue import Schedule, Stay
from tempovlm.core.errors import UserError
from tempovlm.core.request import Answer, Request
from tempovlm.core.units import now_ms, s_from_ms
from tempovlm.engine.transcript import Token
from tempovlm.serving.errors import ApiError, infeasible, invalid, invalid_field, later
from tempovlm.serving.intake.asks import Ask
from tempovlm.serving.intake.pictures import OpeningTimes
from tempovlm.serving.memory import Trim
from tempovlm.serving.metrics import Metrics
from tempovlm.serving.options import Options

if TYPE_CHECKING:
    from tempovlm.api import TempoVLM

_CALIBRATION_MS = 30_000.0
"""The time after which to ask again while the machine is measured."""

IDLE_MS = 60_000.0
"""A server whose last answer is that long ago is idle."""

DRIFT = 1.25
"""The machine is measured anew where answers take this factor more than calibrated, or less."""

USUAL_OUT_MS = 2.0
"""Time for the way out before any was measured."""

USUAL, KEPT = 0.5, 0.99
"""Shares of the last replies whose way out is counted on: by an idle server, and beside others, where a deadline
may be missed as seldom as a bound may be exceeded."""

_RECENT = 100
_LOOK_S = 0.02
_TEND_S = 10.0

_OPTIONS = tuple(
    one.name
    for one in fields(Request)
    if one.name not in ("images", "question", "budget_ms", "weight", "waited_ms")
)

_log = logging.getLogger("tempovlm")


class WayOut:
    """The time from an answer's end to its reply's, which is kept free before a deadline."""

    def __init__(self) -> None:
        self._recent_ms: deque[float] = deque([USUAL_OUT_MS], maxlen=_RECENT)

    def observe(self, took_ms: float) -> None:
        """Learn from a reply."""
        self._recent_ms.append(took_ms)

    def under_ms(self, share: float) -> float:
        """Return the time that a share of the last replies stay under."""
        return sorted(self._recent_ms)[int(share * (len(self._recent_ms) - 1))]


class Answering:
    """One admitted question while it is answered: its tokens as they come, and the answer last.

    Attributes:
        ended_ms: when the answer was there.
    """

    ended_ms: float | None = None

    def __init__(self, ask: Ask, stay: Stay) -> None:
        self.ask, self.stay = ask, stay
        self._items: asyncio.Queue[Token | Answer | ApiError] = asyncio.Queue()
        self._gone = threading.Event()
        self.put = self._items.put_nowait
        """Hands an item over, in the loop's thread."""
        self.is_left = self._gone.is_set
        """Says whether nobody wants the answer."""
        self.leave = self._gone.set
        """Says that nobody wants the answer; it ends within a token."""
        self.thread: int | None = None
        """Answers it."""
        self.is_dismissed = False
        """Whether it was refused after it was admitted, before it began."""

    def dismiss(self, error: ApiError) -> None:
        """Refuse the question, which waits: it is told now, and its thread ends where it is."""
        self.is_dismissed = True
        self.put(error)
        self.leave()

    async def items(self) -> AsyncIterator[Token | Answer]:
        """Yield the items; the answer is the last one.

        Raises:
            ApiError: the question cannot be answered.
        """
        while True:
            item = await self._items.get()
            if isinstance(item, ApiError):
                raise item
            yield item
            if isinstance(item, Answer):
                return


class Desk:
    """Takes questions for one model, in the thread of one event loop.

    Attributes:
        schedule: those that are admitted.
        is_draining: whether no more questions are taken, since the server ends.
        is_calibrating: whether none is taken while the machine is measured anew.
        trim: told what was freed. out: told how long replies take.
    """

    def __init__(self, model: TempoVLM, options: Options) -> None:
        """Measure what is not known yet of this machine, which takes long on a new one, and make the tables."""
        self._model, self._options, self._ended_ms = model, options, now_ms()
        price = options.lane_price
        model.check_price(price.per_ms, "price")
        model.engine.price, model.engine.door.discipline = price, options.discipline
        share = -(-options.max_queue // max(1, len(options.api_keys)))
        lanes = model.engine.door.lanes
        model.engine.door.forecast = forecast = Forecast()
        self.schedule = Schedule(lanes, options.max_queue, share, options.discipline, price, forecast)
        self._answering: dict[Stay, Answering] = {}
        self._pool = ThreadPoolExecutor(options.max_queue + lanes, thread_name_prefix="answer")
        self.is_draining = self.is_calibrating = False
        self.trim, self.out = Trim(), WayOut()
        self.metrics = Metrics(
            model.engine.name,
            {
                "vllm:num_requests_running": ("Requests inside.", lambda: self.schedule.running),
                "vllm:num_requests_waiting": ("Requests that wait.", lambda: self.schedule.waiting),
                "tempovlm:queue_drain_seconds": ("Expected until all here have ended.", self._drain_s),
                "tempovlm:lane_price_per_ms": (
                    "Accuracy that a millisecond of those inside costs those who wait.",
                    lambda: self.schedule.lane_price_per_ms(now_ms()),
                ),
            },
        )
        self.least_ms()
        self._opening = OpeningTimes()

    def _drain_s(self) -> float:
        return s_from_ms(self.schedule.drain_ms(now_ms()))

    @property
    def is_ready(self) -> bool:
        """Whether questions are taken."""
        return not self.is_draining and not self.is_calibrating

    def least_ms(self) -> tuple[float, float]:
        """Return the least budget that some setting fits, and the least that every one does."""
        budgets_ms = self._guard().budgets_ms()
        fit_ms = budgets_ms[np.isfinite(budgets_ms)]
        return (float(fit_ms.min()), float(fit_ms.max())) if len(fit_ms) else (0.0, 0.0)

    def _guard(self) -> Guard:
        return self._model.guard_for(Request(images=(), question="what?", budget_ms=1.0))

    def check_open(self) -> None:
        """Refuse where every question is, before a body is read.

        Raises:
            ApiError: the server ends, the machine is measured, or too many wait.
        """
        drain_ms = self.schedule.drain_ms(now_ms())
        if self.is_draining:
            raise later(503, "draining", "this server ends; ask another one", drain_ms, closes=True)
        if self.is_calibrating:
            raise later(503, "calibrating", "the machine is being measured; ask again later", _CALIBRATION_MS)
        if self.schedule.is_full:
            raise self._full(drain_ms)

    def _full(self, drain_ms: float) -> ApiError:
        message = f"{self.schedule.waiting} requests wait; ask again later, or with a larger budget"
        return later(429, "queue_full", message, drain_ms)

    async def prepare(self, ask: Ask) -> None:
        """Make the tables that a question's length of answers needs beside the loop, if there are none yet."""
        if self.is_ready and not self._model.is_quick(ask.request, ask.tier):
            await asyncio.to_thread(self._model.guard_for, ask.request, tier=ask.tier)

    def admit(self, ask: Ask, accepted_ms: float, owner: str) -> Stay:
        """Admit a question that is expected to be answered in time.

        Raises:
            ApiError: no setting fits its budget, or the queue leaves no time for it.
        """
        self.check_open()
        budget_ms, place = ask.budget.budget_ms, ask.budget.place
        try:
            self._model.check_price(ask.request.price_per_ms)
            guard = self._model.guard_for(ask.request, tier=ask.tier)
        except UserError as error:
            raise invalid_field(error) from None
        opening_ms = self._opening.of(ask.picture)
        least_ms = max(0.0, guard.calibrated_ms()) + opening_ms + self.out.under_ms(USUAL)
        time_ms = now_ms()
        deadline_ms = math.inf if budget_ms is None else accepted_ms + budget_ms
        if budget_ms is not None and least_ms > budget_ms:
            cause = f", {opening_ms:.0f} of them to open the picture" if opening_ms > least_ms / 2 else ""
            raise infeasible(f"no setting fits {budget_ms:g} ms; the least is {least_ms:.0f} ms{cause}", place)
        if time_ms + least_ms > deadline_ms:
            if len(self.schedule):  # others may have kept the loop from its body
                raise self._full(self.schedule.drain_ms(time_ms))
            raise infeasible(f"too late: {time_ms - accepted_ms:.0f} ms had passed when the body was whole", place)
        # The margin says how slow the machine is now, and the slowest of the last replies how long the way out may
        # be. Only answers tell that this is over, so who comes to an idle server is let in all the same.
        need_ms = (
            max(0.0, guard.least_ms()) + opening_ms + self.out.under_ms(KEPT) if len(self.schedule) else least_ms
        )
        self._foresee()
        runs_over = ask.request.on_deadline == "finish"
        given = self._priced(ask, guard, opening_ms)
        stay = Stay(accepted_ms, deadline_ms, need_ms, owner, runs_over, self._options.weight_of(owner), **given)
        if not self.schedule.admit(stay, time_ms):
            instead = self.schedule.admit_instead(stay, time_ms)
            full = self._full(self.schedule.drain_ms(time_ms))
            if instead is None:
                raise full
            self._answering.pop(instead).dismiss(full)
        self.metrics.recent.waits(self.schedule.waiting, time_ms)
        return stay

    def _foresee(self) -> None:
        """Tell the schedule when those inside end, if their settings are chosen by a derived price."""
        ends = self._model.engine.door.ends() if self.schedule.price.is_derived else {}
        for answering in self._answering.values() if ends else ():
            if answering.thread in ends:
                self.schedule.expect(answering.stay, ends[answering.thread])

    def _priced(self, ask: Ask, guard: Guard, opening_ms: float) -> dict[str, Any]:
        """Return what the price of a question's time goes by; nothing where it has none."""
        picture, request = ask.picture, ask.request
        size = None if picture is None else (picture.height, picture.width)
        question = Question(text=request.question, image_size=size, left_ms=request.budget_ms, style=request.style)
        worths = guard.worths(question) if self.schedule.price.is_derived and guard.has_price else None
        if worths is None:
            return {}
        gains, usual = worths
        return {"expected_ms": guard.expected_ms() + opening_ms, "gains": gains, "usual": usual}

    def answer(self, ask: Ask, stay: Stay) -> Answering:
        """Begin to answer an admitted question, in a thread of its own."""
        answering = self._answering[stay] = Answering(ask, stay)
        self._pool.submit(self._work, answering, asyncio.get_running_loop().call_soon_threadsafe)
        return answering

    def _work(self, answering: Answering, in_loop: Callable[..., object]) -> None:
        answering.thread = threading.get_ident()
        outcome: Answer | ApiError = ApiError(500, "internal_error", "the server failed to answer")
        try:
            outcome = self._ask(answering, in_loop)
        except UserError as error:
            outcome = self._wrong(answering.ask, str(error))
        except Exception:  # noqa: BLE001 - its text goes to the log alone
            _log.exception("%s: the server failed to answer", answering.ask.request.request_id)
        in_loop(self._end, answering, outcome)
        picture = answering.ask.picture
        self.trim.count(0 if picture is None else picture.num_bytes)

    @staticmethod
    def _wrong(ask: Ask, message: str) -> ApiError:
        """Return the error of a question that could not be answered; only its picture is first read then."""
        source = "the picture's bytes"
        if ask.picture is None or not message.startswith(source):
            return invalid(message)
        return invalid(message.replace(source, "the picture", 1), ask.picture.param, "invalid_image")

    def _ask(self, answering: Answering, in_loop: Callable[..., object]) -> Answer:
        ask, request = answering.ask, answering.ask.request
        options = {name: getattr(request, name) for name in _OPTIONS}
        budget_ms = request.budget_ms
        answer = self._model.answer(
            request.images[0] if request.images else None,
            request.question,
            budget_ms=None if budget_ms is None else max(budget_ms - self.out.under_ms(KEPT), budget_ms / 2),
            tier=ask.tier,
            cancel=answering.is_left,
            on_token=(lambda token: in_loop(answering.put, token)) if ask.stream else None,
            weight=answering.stay.weight,
            waited_ms=now_ms() - answering.stay.accepted_ms,
            **options,
        )
        answering.ended_ms = now_ms()
        if budget_ms is None:
            return answer
        has_answer = bool(answer.num_output_tokens) or answer.finish_reason in ("stop", "length")
        is_met = has_answer and answer.timings_ms["total"] <= budget_ms
        return replace(answer, budget_ms=budget_ms, budget_met=is_met)

    def _end(self, answering: Answering, outcome: Answer | ApiError) -> None:
        """Free the place, hand the answer over, and count it once the loop has sent it."""
        self._ended_ms = now_ms()
        if answering.is_dismissed:
            return
        self.schedule.end(answering.stay, self._ended_ms)
        del self._answering[answering.stay]
        answer = outcome if isinstance(outcome, Answer) else None
        if answer is not None and answer.finish_reason == "rejected":  # counted where errors are
            message = "no setting fits the time that was left after waiting; ask again later"
            outcome, answer = later(429, "queue_full", message, self.schedule.drain_ms(self._ended_ms)), None
        answering.put(outcome)
        if answer is not None:  # in the loop's turn, whoever waits for the item comes first
            asyncio.get_running_loop().call_soon(self._learn, answering.ask, answer)

    def _learn(self, ask: Ask, answer: Answer) -> None:
        self.metrics.observe(answer, ask.request.price_per_ms)
        if ask.picture is not None and answer.timings_ms["vision_encoder"]:
            self._opening.observe(ask.picture, answer.timings_ms["preprocess"])

    async def drained(self, grace_ms: float) -> None:
        """Wait until all have ended; if all have deadlines, at most for a grace after the last one."""
        end_ms = max(self.schedule.last_deadline_ms, now_ms()) + grace_ms
        while len(self.schedule) and now_ms() < end_ms:
            await asyncio.sleep(_LOOK_S)

    async def calibrate(self) -> tuple[float, float]:
        """Measure the machine anew while no question is taken; return the least budgets.

        Raises:
            ApiError: it is measured already, or the server ends.
        """
        if not self.is_ready:
            self.check_open()
        self.is_calibrating = True
        try:
            await self.drained(_CALIBRATION_MS)
            await asyncio.to_thread(self._model.calibrate, force=True)
            return await asyncio.to_thread(self.least_ms)
        finally:
            self.is_calibrating = False

    async def tend(self) -> None:
        """Measure the machine anew whenever it is due, as long as the server lives, where that is allowed."""
        while self._options.allow_calibrate:
            await asyncio.sleep(_TEND_S)
            if self.is_due(now_ms()):
                _log.info("answers take other times than calibrated; measuring the machine anew")
                await self.calibrate()

    def is_due(self, time_ms: float) -> bool:
        """Whether nobody has asked for a while, and answers take other times than calibrated."""
        if not self.is_ready or len(self.schedule) or time_ms - self._ended_ms < IDLE_MS:
            return False
        margin = self._guard().margin
        return margin is not None and not 1 / DRIFT < margin.factor < DRIFT
