"""One request's work: the picture and both choices, as far as it got, and the answer made of it."""

from __future__ import annotations

import math
import uuid
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from tempovlm.control.guard import Choice, Guard, TierChoice
from tempovlm.control.price import FREE, LanePrice
from tempovlm.control.queue import End, is_at_once
from tempovlm.core.request import STAGES, Answer, FinishReason, Prediction, Request
from tempovlm.core.units import now_ms, wall_clock
from tempovlm.engine.company.ahead import Opened
from tempovlm.engine.glance import Glance, take_glance
from tempovlm.engine.runner import Prepared
from tempovlm.engine.transcript import Transcript
from tempovlm.engine.watch import Interrupted, Watch
from tempovlm.latency.clock import Reading, StageClock

if TYPE_CHECKING:
    from tempovlm.engine.engine import Engine


class Work:
    """A request that is being answered.

    Attributes:
        ready: the crops and the prompt; None before they were made.
        vision: (C, G, D) projected tokens; None before, and without a picture.
        stopped_at: the stage in which the request was ended; None while nobody ended it.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request,
        guard: Guard,
        clock: StageClock,
        watch: Watch,
        opened: Opened | None = None,
    ) -> None:
        """Begin with a request, whose picture may be `opened`."""
        self.ready: Prepared | None = None
        self.vision: Tensor | None = None
        self.transcript = Transcript(request, engine.runner.tokenizer)
        self.stopped_at: str | None = None
        self._engine, self._request, self._guard = engine, request, guard
        self._clock, self._watch, self._opened = clock, watch, opened
        self._tier: TierChoice | None = None
        self._choice: Choice | None = None
        self._begun_ms = 0.0

    def look(self) -> tuple[Choice, Prepared]:
        """Open and encode the picture, and make both choices.

        Raises:
            Interrupted: the deadline came, the caller cancelled, or the guard refuses.
        """
        run, request, clock, watch = self._engine.runner, self._request, self._clock, self._watch
        watch.check("queue")
        self._begun_ms = now_ms()
        image = self._open()
        watch.check("preprocess")
        tier, glance = self._choose_tier(image)
        self._tier = tier
        if tier.feasible is not None:
            self._tell(self._guard.least_of(tier))
        clock.mark("control")
        chosen_at_ms = now_ms()
        if request.on_deadline == "reject" and self._is_refused(tier):
            raise Interrupted("rejected", "control")
        with watch.piece("preprocess", run.num_crops(image, tier.tier)):
            ready = glance.prepare(run, tier.tier, request) if glance else run.prepare(image, tier.tier, request)
        self.ready = ready
        clock.mark("preprocess")
        num_crops = len(ready.crops.patches) if ready.crops else 0
        ticks = watch.ticks("vision_encoder", num_crops)
        patches = glance.encode(run, ready.crops, ticks) if glance else run.encode(ready.crops, ticks)
        clock.mark("vision_encoder")
        with watch.piece("projector", num_crops):
            self.vision = run.project(patches, ready.crops)
        clock.mark("projector")
        watch.check("control")
        sight = run.see(ready, tier.tier, self.vision, pool=self._guard.pools(request))
        if clock.is_device_busy():
            self._guard.rehearse(request, tier)
        passed_ms = self._passed_ms()  # waits for the device
        picture_ms = None if image is None or glance else now_ms() - chosen_at_ms
        lane = self._lane_price()
        self._choice = choice = self._guard.choose_compute(request, tier, sight, passed_ms, picture_ms, lane)
        if choice.predicted is not None:
            expected_ms = choice.margin * (choice.predicted.p50_ms - passed_ms)
            self._tell(Prediction(p50_ms=expected_ms, upper_ms=choice.predicted.upper_ms - passed_ms))
        clock.mark("control")
        return choice, ready

    def _open(self) -> np.ndarray | None:
        """Return the picture's pixels (H, W, 3), None without a picture."""
        if self._opened is not None:
            return self._opened.close()
        with self._watch.piece("preprocess"):
            image = self._engine.runner.open(self._request)
        self._clock.mark("preprocess")
        return image

    def read(self) -> Reading:
        """Return the laps and the total, with the time of a picture's opening where it belongs."""
        reading = self._clock.read()
        return reading if self._opened is None else self._opened.placed(reading)

    def _is_refused(self, tier: TierChoice) -> bool:
        """Whether nothing fits; or nothing is worth its time to others, and that can still be told at once.

        Only answers tell that the machine is as fast again as calibrated: so what would fit then is tried where
        nobody waits.
        """
        if self._request.budget_ms is None:
            return False
        if tier.feasible is False:
            needs_ms = self._guard.calibrated_ms()
            return self._engine.door.waiting > 0 or self._passed_ms() + needs_ms > self._request.budget_ms
        return not tier.is_worth_it and is_at_once(now_ms() - self._watch.accepted_ms, self._request.budget_ms)

    def _tell(self, rest: Prediction) -> None:
        """Say at the door when this request ends."""
        begin_ms = now_ms()
        self._engine.door.expect(End(begin_ms + rest.p50_ms, begin_ms + rest.upper_ms))

    def stop(self, reason: FinishReason, stage: str) -> None:
        """End the answer with the tokens that there are."""
        self.transcript.end(reason)
        self.stopped_at = stage

    def answer(self, reading: Reading) -> Answer:
        """Return the answer, whole or cut."""
        choice = self._choice or self._guard.choice_of(self._tier)
        accepted_ms = self._watch.accepted_ms
        return build_answer(
            self._engine, self._request, choice, self.ready, self.transcript, reading, accepted_ms, self.stopped_at
        )

    def _choose_tier(self, image: np.ndarray | None) -> tuple[TierChoice, Glance | None]:
        """The first choice, after a glance at the picture where the policy needs one to choose by."""
        request, guard, engine = self._request, self._guard, self._engine
        size, elapsed_ms = image_size(image), self._passed_ms()
        if image is None or not guard.wants_glance(request, elapsed_ms):
            return guard.choose_tier(request, size, elapsed_ms, lane=self._lane_price()), None
        self._clock.mark("control")
        glance = take_glance(engine.runner, image, engine.whole.tiers[0], request, self._clock)
        with engine.runner.small_work():
            chosen = guard.choose_tier(request, size, glance.elapsed_ms, glance.tokens, self._lane_price())
            return chosen, glance

    @property
    def _is_priced(self) -> bool:
        """Whether the time of those who wait is left to them by its price, derived from their deadlines."""
        return self._engine.price.is_derived and self._guard.has_price

    def _lane_price(self) -> LanePrice:
        """The price of lane time, at the share of it that the request has from its first piece of work on."""
        request, engine = self._request, self._engine
        if request.budget_ms is None or not self._guard.has_price:
            return FREE
        shares_ms = engine.door.shares_ms(self._begun_ms, self._guard.least_ms()) if self._is_priced else math.inf
        return LanePrice(engine.price, shares_ms, request.weight)

    def _passed_ms(self) -> float:
        """Time since acceptance, and what is kept for those who wait, as far as a setting fits beside it.

        Under a derived price that is the least that they need; otherwise an equal share for each. 0 where no
        choice or prediction hangs on it: a device is not waited for.
        """
        budget_ms, guard, door = self._request.budget_ms, self._guard, self._engine.door
        if budget_ms is None and guard.profile is None:
            return 0.0
        passed_ms = self._clock.elapsed_ms()
        if budget_ms is None or not door.waiting:
            return passed_ms
        most_ms = door.room_ms(now_ms()) if self._is_priced else door.share_ms(now_ms())
        return max(passed_ms, budget_ms - max(most_ms, guard.least_ms(self._tier)))


def image_size(image: np.ndarray | None) -> tuple[int, int] | None:
    """Height and width of pixels (H, W, 3)."""
    return None if image is None else (image.shape[0], image.shape[1])


def build_answer(
    engine: Engine,
    request: Request,
    choice: Choice,
    ready: Prepared | None,
    transcript: Transcript,
    reading: Reading,
    accepted_ms: float,
    stopped_at: str | None = None,
) -> Answer:
    """Everything that a request which is over has to say."""
    steps_ms = reading.laps_ms("decode")
    first = next((i for i, lap in enumerate(reading.laps) if lap.stage == "prefill"), None)
    budget_ms, total_ms, has_tokens = request.budget_ms, reading.total_ms, bool(transcript.tokens)
    grid = ready.crops.grid if ready and ready.crops else None
    has_answer = has_tokens or transcript.finish not in ("deadline", "cancelled", "rejected")
    return Answer(
        text=transcript.text,
        knobs=choice.knobs,
        timings_ms={stage: reading.stage_ms(stage) for stage in STAGES} | {"total": total_ms},
        ttft_ms=sum(lap.duration_ms for lap in reading.laps[: first + 1]) if first and has_tokens else None,
        tpot_ms=sum(steps_ms) / len(steps_ms) if steps_ms else None,
        budget_ms=budget_ms,
        budget_met=None if budget_ms is None else has_answer and total_ms <= budget_ms,
        budget_feasible=choice.feasible,
        predicted=choice.predicted,
        finish_reason=transcript.finish or "stop",
        policy=choice.policy,
        num_vision_tokens=ready.prompt.num_vision_tokens if ready else 0,
        num_text_tokens=ready.prompt.num_text_tokens if ready else 0,
        num_output_tokens=len(transcript.tokens),
        model=engine.name,
        device=str(engine.device),
        tiling=None if grid is None else (grid.rows, grid.cols),
        stopped_at=stopped_at,
        tokens=tuple(transcript.tokens),
        step_ms=steps_ms,
        accepted_at=wall_clock(accepted_ms),
        request_id=uuid.uuid4().hex if request.request_id is None else request.request_id,
        margin=choice.margin,
        weights_hash=engine.weights_hash or None,
        backend=engine.runner.backend,
    )
