"""One request from acceptance to answer: the function that the profiler, the commands and a server all call.

So the code that is profiled is the code that serves. An engine holds a model, its knob space and its plans, and no
state of requests: streams with different plans interleave on it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import torch

from tempovlm.control.guard import Choice, Guard, TierChoice
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobConfig, KnobSpace
from tempovlm.core.plan import Plan, Ranking
from tempovlm.core.request import STAGES, Answer, Request
from tempovlm.core.weights import Weights
from tempovlm.engine.capture import usual_buckets
from tempovlm.engine.feature_cache import FeatureCache
from tempovlm.engine.forks import FORKS, NO_CUDA_IN_CHILD
from tempovlm.engine.glance import Glance, take_glance
from tempovlm.engine.graphs import Advance, graph_decoder
from tempovlm.engine.open_answers import OpenAnswers
from tempovlm.engine.runner import Prepared, Runner
from tempovlm.engine.sampling import sampler_for
from tempovlm.engine.transcript import Token, Transcript
from tempovlm.engine.vision_graphs import vision_graphs
from tempovlm.latency.clock import Reading, StageClock, stage_clock
from tempovlm.model.narrow import NarrowDecoder
from tempovlm.model.prompt import Tokenizer
from tempovlm.model.vlm import Molmo


class Engine:
    """Answers requests on one model and one device, with as many threads as torch had when it was made."""

    def __init__(
        self,
        model: Molmo,
        tokenizer: Tokenizer,
        *,
        ranking: Ranking | None = None,
        name: str = "model",
        exact: bool = False,
        feature_cache_mb: float = 0.0,
        weights: Weights = "bf16",
        option_letters: str = "",
    ) -> None:
        shape = model.config.shape
        rules = OpenAnswers.of(tokenizer, option_letters, model.decoder.embedding)
        self.runner = Runner(
            model,
            tokenizer,
            exact,
            NarrowDecoder.of(model.decoder),
            graph_decoder(model, weights, is_limited=rules is not None),
            vision_graphs(model),
            FeatureCache.of(feature_cache_mb),
            rules,
        )
        self.space = KnobSpace.for_model(shape)
        self.ranking = ranking or Ranking.evenly_spaced(shape.num_blocks)
        self.name, self.option_letters = name, option_letters
        self.native = Guard.fixed(self.space.native, self.space)
        self._threads, self._process = torch.get_num_threads(), os.getpid()
        self._plans = {knobs: Plan.build(knobs, self.ranking, shape) for knobs in self.space}

    def __getstate__(self) -> dict[str, Any]:
        """Return the constructor arguments, for copies.

        Raises:
            UserError: captured graphs belong to one model in one process.
        """
        if self.runner.graphs is not None or self.runner.vision is not None:
            raise UserError(
                f"the model on {self.device}: its captured graphs cannot be copied or sent to another process; "
                "load the model anew where it is to answer"
            )
        return self.__dict__

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.runner.device

    @property
    def threads(self) -> int:
        """Threads of an operation on a CPU."""
        return FORKS.threads(self._threads)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Context in which everything this engine computes runs, with its number of threads.

        Raises:
            UserError: the process is a fork in which nothing can be computed.
        """
        if self.device.type == "cuda" and os.getpid() != self._process:
            raise UserError(NO_CUDA_IN_CHILD)
        with FORKS.computing():
            before = torch.get_num_threads()
            torch.set_num_threads(self.threads)
            try:
                yield
            finally:
                torch.set_num_threads(FORKS.threads(before))

    def plan(self, knobs: KnobConfig) -> Plan:
        """Return the plan of a setting.

        Raises:
            UserError: the setting is not in the knob space.
        """
        self.space.validate(knobs)
        return self._plans[knobs]

    def warmup(self, knobs: Iterable[KnobConfig] | None = None, advance: Advance | None = None) -> int:
        """Capture the graphs of some settings (default: all); return their number, 0 on a CPU.

        Prompts are captured for questions of the usual length about pictures of any shape.
        """
        plans, captured = [self.plan(one) for one in knobs or self.space], 0
        with self.computing():
            if self.runner.vision is not None:
                captured += self.runner.vision.warmup({plan.knobs.tier for plan in plans}, advance)
            if self.runner.graphs is not None:
                lengths = usual_buckets({plan.knobs.tier for plan in plans}, self.runner.model.config.vision)
                captured += self.runner.graphs.warmup(plans, advance, lengths)
        return captured

    def answer(self, request: Request, guard: Guard | None = None) -> Answer:
        """Answer a request; the guard's policy chooses the setting. Without a guard the native setting runs."""
        answer = None
        for item in self.stream(request, guard):
            answer = item
        assert isinstance(answer, Answer)
        return answer

    def stream(
        self, request: Request, guard: Guard | None = None, cancel: Callable[[], bool] | None = None
    ) -> Iterator[Token | Answer]:
        """Yield tokens as they come and the answer last; the clock starts with this call.

        `cancel` is called between tokens; if it returns True, the answer ends there.
        """
        with self.computing():
            clock = stage_clock(self.device)
        return self._stepped(self._run(request, guard or self.native, clock, cancel))

    def _stepped(self, items: Generator[Token | Answer, None, None]) -> Iterator[Token | Answer]:
        """Yield the items; a stream computes only while one is being made."""
        with closing(items):
            while True:
                with self.computing():
                    item = next(items, None)
                if item is None:
                    return
                yield item

    def _run(
        self, request: Request, guard: Guard, clock: StageClock, cancel: Callable[[], bool] | None
    ) -> Generator[Token | Answer, None, None]:
        run, sample = self.runner, sampler_for(request, self.device)
        image = run.open(request)
        clock.mark("preprocess")
        tier, glance = self._choose_tier(request, guard, image, clock)
        clock.mark("control")
        ready = glance.prepare(run, tier.tier, request) if glance else run.prepare(image, tier.tier, request)
        clock.mark("preprocess")
        patches = glance.encode(run, ready.crops) if glance else run.encode(ready.crops)
        clock.mark("vision_encoder")
        vision = run.project(patches, ready.crops)
        clock.mark("projector")
        sight = run.see(ready, tier.tier, vision, pool=guard.pools(request))
        choice = guard.choose_compute(request, tier, sight, _passed_ms(request, guard, clock))
        clock.mark("control")
        with run.lane() as lane:
            plan = self._plans[choice.knobs]
            state = run.prefill(ready.prompt, vision, plan, request.max_new_tokens, lane)
            token = sample(run.limits([request])(state.logits))
            transcript = Transcript(request, run.tokenizer)
            first, steps = transcript.add(int(token)), run.steps(token, state, sample, request)
            clock.mark("prefill")
            yield from first
            while not (transcript.finish or self._interrupt(transcript, request, choice, clock, cancel)):
                made = next(steps)
                next_token = transcript.add(made.token)
                clock.mark("decode", made.event)
                yield from next_token
        reading = clock.read()
        yield from transcript.settled()
        answer = build_answer(self, request, choice, ready, transcript, reading)
        guard.observe(answer, reading.laps[0].duration_ms)
        yield answer
        run.settle()

    def _choose_tier(
        self, request: Request, guard: Guard, image: np.ndarray | None, clock: StageClock
    ) -> tuple[TierChoice, Glance | None]:
        """Make the first choice, after a glance at the picture if the policy needs one."""
        size, elapsed_ms = image_size(image), _passed_ms(request, guard, clock)
        if image is None or not guard.wants_glance(request, elapsed_ms):
            return guard.choose_tier(request, size, elapsed_ms), None
        clock.mark("control")
        glance = take_glance(self.runner, image, self.space.tiers[0], request, clock)
        with self.runner.small_work():
            return guard.choose_tier(request, size, glance.elapsed_ms, glance.tokens), glance

    def _interrupt(
        self,
        transcript: Transcript,
        request: Request,
        choice: Choice,
        clock: StageClock,
        cancel: Callable[[], bool] | None,
    ) -> bool:
        """End the transcript if the caller cancels, or if the next token is not expected in time."""
        if cancel is not None and cancel():
            transcript.end("cancelled")
        elif _is_late(request, choice, clock):
            transcript.end("deadline")
        return transcript.finish is not None


def image_size(image: np.ndarray | None) -> tuple[int, int] | None:
    """Return height and width of pixels (H, W, 3)."""
    return None if image is None else (image.shape[0], image.shape[1])


def _passed_ms(request: Request, guard: Guard, clock: StageClock) -> float:
    """Return the time since acceptance; 0 if no choice or prediction needs it, so as not to wait for a device."""
    if request.budget_ms is None and guard.profile is None:
        return 0.0
    return clock.elapsed_ms()


def _is_late(request: Request, choice: Choice, clock: StageClock) -> bool:
    """Whether the next token would come too late, for a request that wants to stop at its deadline."""
    if request.on_deadline == "finish" or request.budget_ms is None:
        return False
    return clock.elapsed_ms() + choice.step_ms > request.budget_ms


def build_answer(
    engine: Engine,
    request: Request,
    choice: Choice,
    ready: Prepared,
    transcript: Transcript,
    reading: Reading,
) -> Answer:
    """Return the answer of a finished request."""
    steps_ms = reading.laps_ms("decode")
    first = next(i for i, lap in enumerate(reading.laps) if lap.stage == "prefill")
    budget_ms, total_ms = request.budget_ms, reading.total_ms
    grid = ready.crops.grid if ready.crops else None
    return Answer(
        text=transcript.text,
        knobs=choice.knobs,
        timings_ms={stage: reading.stage_ms(stage) for stage in STAGES} | {"total": total_ms},
        ttft_ms=sum(lap.duration_ms for lap in reading.laps[: first + 1]),
        tpot_ms=sum(steps_ms) / len(steps_ms) if steps_ms else None,
        budget_ms=budget_ms,
        budget_met=None if budget_ms is None else total_ms <= budget_ms,
        budget_feasible=choice.feasible,
        predicted=choice.predicted,
        finish_reason=transcript.finish or "stop",
        policy=choice.policy,
        num_vision_tokens=ready.prompt.num_vision_tokens,
        num_text_tokens=ready.prompt.num_text_tokens,
        num_output_tokens=len(transcript.tokens),
        model=engine.name,
        device=str(engine.device),
        tiling=None if grid is None else (grid.rows, grid.cols),
        tokens=tuple(transcript.tokens),
        step_ms=steps_ms,
    )
