"""One request's work as far as it got, and the answer made of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from tempovlm.control.guard import Choice, Guard, TierChoice
from tempovlm.core.request import STAGES, Answer, FinishReason, Request
from tempovlm.engine.runner import Prepared
from tempovlm.engine.transcript import Transcript
from tempovlm.latency.clock import Reading

if TYPE_CHECKING:
    from tempovlm.engine.engine import Engine


class Work:
    """What was made of a request so far.

    Attributes:
        choice: the setting; None before top-k and depth are chosen.
        ready: the crops and the prompt; None before they were made.
        vision: (C, G, D) projected tokens; None before, and without a picture.
        stopped_at: the stage in which the request was ended; None while nobody ended it.
    """

    def __init__(self, engine: Engine, request: Request, guard: Guard) -> None:
        self.engine, self.request, self.guard = engine, request, guard
        self.choice: Choice | None = None
        self.ready: Prepared | None = None
        self.vision: Tensor | None = None
        self.transcript = Transcript(request, engine.runner.tokenizer)
        self.stopped_at: str | None = None
        self._tier: TierChoice | None = None

    def choose(self, tier: TierChoice) -> None:
        """Take the first choice."""
        self._tier = tier

    @property
    def chosen(self) -> tuple[Choice, Prepared]:
        """The whole choice and the prompt, once they are there."""
        assert self.choice is not None
        assert self.ready is not None
        return self.choice, self.ready

    def stop(self, reason: FinishReason, stage: str) -> None:
        """End the answer with the tokens that there are."""
        self.transcript.end(reason)
        self.stopped_at = stage

    def answer(self, reading: Reading) -> Answer:
        """Return the answer, whole or cut."""
        choice = self.choice or self.guard.choice_of(self._tier)
        return build_answer(
            self.engine, self.request, choice, self.ready, self.transcript, reading, self.stopped_at
        )


def build_answer(
    engine: Engine,
    request: Request,
    choice: Choice,
    ready: Prepared | None,
    transcript: Transcript,
    reading: Reading,
    stopped_at: str | None = None,
) -> Answer:
    """Everything that a request which is over has to say."""
    steps_ms = reading.laps_ms("decode")
    first = next((i for i, lap in enumerate(reading.laps) if lap.stage == "prefill"), None)
    budget_ms, total_ms, has_tokens = request.budget_ms, reading.total_ms, bool(transcript.tokens)
    grid = ready.crops.grid if ready and ready.crops else None
    is_whole = transcript.finish != "rejected"
    return Answer(
        text=transcript.text,
        knobs=choice.knobs,
        timings_ms={stage: reading.stage_ms(stage) for stage in STAGES} | {"total": total_ms},
        ttft_ms=sum(lap.duration_ms for lap in reading.laps[: first + 1]) if first and has_tokens else None,
        tpot_ms=sum(steps_ms) / len(steps_ms) if steps_ms else None,
        budget_ms=budget_ms,
        budget_met=None if budget_ms is None else is_whole and total_ms <= budget_ms,
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
    )
