"""One request among others: what its caller prepares, and what the thread that feeds the device adds to it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch

from tempovlm.control.guard import Guard
from tempovlm.control.policy import Sight
from tempovlm.core.plan import Plan
from tempovlm.core.request import Answer, Request
from tempovlm.core.units import now_ms
from tempovlm.engine.sampling import sampler_for
from tempovlm.engine.transcript import Transcript
from tempovlm.engine.work import build_answer, image_size
from tempovlm.latency.clock import QUEUE, Lap, Reading

if TYPE_CHECKING:
    from tempovlm.engine.engine import Engine


class Member:
    """A request without a budget that is answered with others.

    It is made in its caller's thread, where the picture is opened and cut and the prompt written, while the device
    works for others.

    Attributes:
        plan: of its setting. ready: its crops and prompt. transcript: its tokens so far. sample: chooses them.
    """

    def __init__(
        self, engine: Engine, request: Request, guard: Guard, accepted_ms: float, turn: threading.Lock
    ) -> None:
        """Prepare a request, whose clock began at `accepted_ms`; all but opening the picture in its `turn`.

        More than one at a time would hold Python's lock while the device waits for its thread.

        Raises:
            UserError: the picture cannot be read, or the prompt is too long.
        """
        run, start_ms = engine.runner, now_ms()
        image = run.open(request)
        opened_ms = now_ms()
        with turn:
            begun_ms = now_ms()
            tier = guard.choose_tier(request, image_size(image), 0.0)
            self._choice = guard.choose_compute(request, tier, Sight(tier.tier, None, 0, 0), 0.0)
            chosen_ms = now_ms()
            self.ready = run.prepare(image, tier.tier, request)
            ready_ms = now_ms()
        self.request, self.accepted_ms = request, accepted_ms
        self.plan: Plan = engine.plan(self._choice.knobs)
        self.transcript, self.sample = Transcript(request, run.tokenizer), sampler_for(request, run.device)
        self._engine, self._done = engine, threading.Event()
        self._error: BaseException | None = None
        self._total_ms = 0.0
        preparing_ms = (opened_ms - start_ms) + (ready_ms - chosen_ms)
        self._laps = [Lap("preprocess", preparing_ms), Lap("control", chosen_ms - begun_ms)]
        self._prepared = None
        if run.device.type == "cuda":
            self._prepared = torch.cuda.current_stream(run.device).record_event()

    def __len__(self) -> int:
        """Tokens of the prompt."""
        return len(self.ready.prompt.tokens)

    def hand_over(self) -> None:
        """Let the current stream use what another one prepared."""
        if self._prepared is None:
            return
        stream = torch.cuda.current_stream(self._engine.device)
        stream.wait_event(self._prepared)
        if self.ready.crops is not None:
            self.ready.crops.record_stream(stream)

    def spent(self, *readings: Reading) -> None:
        """Add the stages of readings that are the request's own; all other time it waits."""
        self._laps += [lap for reading in readings for lap in reading.laps if lap.stage != QUEUE]

    def stepped(self, step_ms: float) -> None:
        """Add the time from one token to the next, in which others may have joined."""
        self._laps.append(Lap("decode", step_ms))

    def finish(self, ended_ms: float) -> None:
        """The last token was read at `ended_ms`; wake the caller."""
        self._total_ms = ended_ms - self.accepted_ms
        self._done.set()

    def fail(self, error: BaseException) -> None:
        """Wake a caller that waits by an error; what was prepared is freed here, not where that is caught."""
        if not self._done.is_set():
            self._error = error
            del self.ready, self._prepared
            self._done.set()

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
        return build_answer(
            self._engine, self.request, self._choice, self.ready, self.transcript, reading, self.accepted_ms
        )
