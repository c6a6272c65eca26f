"""One request from acceptance to answer: the function that the profiler, the commands and a server all call.

So the code that is profiled is the code that serves. An engine holds a model, its knob space and its plans, and no
state of requests: streams with different plans interleave on it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch

from tempovlm.control.guard import Guard
from tempovlm.control.price import Price
from tempovlm.control.queue import Door, Ticket
from tempovlm.core.decode_dtype import DecodeDtype
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobConfig, KnobSpace
from tempovlm.core.plan import Plan, Ranking
from tempovlm.core.request import Answer, Request
from tempovlm.core.units import now_ms
from tempovlm.engine.company.ahead import Opened
from tempovlm.engine.company.company import Company
from tempovlm.engine.company.member import Asked
from tempovlm.engine.cpu.library import Precision
from tempovlm.engine.cpu.stages import CpuStages
from tempovlm.engine.cuda.capture import Recorder, usual_buckets
from tempovlm.engine.cuda.graphs import Advance, graph_decoder
from tempovlm.engine.cuda.vision_graphs import vision_graphs
from tempovlm.engine.feature_cache import FeatureCache
from tempovlm.engine.forks import FORKS, NO_CUDA_IN_CHILD
from tempovlm.engine.open_answers import OpenAnswers
from tempovlm.engine.runner import Runner
from tempovlm.engine.sampling import sampler_for
from tempovlm.engine.transcript import Token
from tempovlm.engine.watch import Interrupted, Pieces, Watch
from tempovlm.engine.work import Work
from tempovlm.latency.clock import stage_clock
from tempovlm.model.family import VisionLanguageModel
from tempovlm.model.narrow import NarrowDecoder
from tempovlm.model.prompt import Tokenizer
from tempovlm.model.vlm import Molmo


class Engine:
    """Answers requests on one model and one device, with as many threads as torch had when it was made.

    Attributes:
        whole: all settings of the model. space: those that may run.
        company: answers requests together while several are in flight; None on a CPU.
        pieces: recent times of pieces of work.
        price: what lane time costs where others wait.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        tokenizer: Tokenizer,
        *,
        space: KnobSpace | None = None,
        ranking: Ranking | None = None,
        name: str = "model",
        exact: bool = False,
        feature_cache_mb: float = 0.0,
        decode_dtype: DecodeDtype = "bf16",
        option_letters: str = "",
        precision: Precision | None = None,
        most_threads: int = 1,
        weights_hash: str = "",
    ) -> None:
        shape, self._threads = model.config.shape, torch.get_num_threads()
        recorder = Recorder.on(model.decoder.embedding.device)  # stages run in turn, so that they share memory
        rules = OpenAnswers.of(tokenizer, option_letters, model.decoder.embedding)
        self.runner = Runner(
            model,
            tokenizer,
            exact,
            NarrowDecoder.of(model.decoder),
            graph_decoder(model, decode_dtype, is_limited=rules is not None, recorder=recorder),
            vision_graphs(model, recorder),
            FeatureCache.of(feature_cache_mb),
            rules,
            None if precision is None else CpuStages(cast(Molmo, model), precision, self._threads, most_threads),
        )
        self.whole = KnobSpace.for_model(shape)
        self.space = space or self.whole
        self.ranking = ranking or Ranking.evenly_spaced(shape.num_blocks)
        self.name, self.option_letters, self.weights_hash = name, option_letters, weights_hash
        self.native = Guard.fixed(self.space.native, self.space)
        self.door, self.price = Door(), Price()
        self.company = Company.of(self)
        self.pieces = Pieces()
        self._process = os.getpid()
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
        """The most threads of a stage on a CPU."""
        stages = self.runner.stages
        return FORKS.threads(self._threads if stages is None else stages.crew.most)

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
            torch.set_num_threads(FORKS.threads(self._threads))
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
        usual = [self.plan(one) for one in knobs or (self.space.native, self.space.cheapest)]
        plans, captured = [self.plan(one) for one in knobs or self.space], 0
        with self.door.enter(self.door.line_up(now_ms())), self.computing():
            if self.runner.vision is not None:
                blank = np.zeros((64, 64, 3), np.uint8)  # what cuts a picture is compiled by any
                self.runner.prepare(blank, self.space.native.tier, Request(images=(blank,), question="what?"))
                captured += self.runner.vision.warmup({plan.knobs.tier for plan in plans}, advance)
            if self.runner.graphs is not None:
                lengths = usual_buckets({plan.knobs.tier for plan in plans}, self.runner.model.config.vision)
                captured += self.runner.graphs.warmup(plans, advance, lengths, usual)
            if captured:
                torch.cuda.empty_cache()  # of the runs before the captures: as much as the graphs themselves have
        return captured

    def answer(
        self,
        request: Request,
        guard: Guard | None = None,
        cancel: Callable[[], bool] | None = None,
        on_token: Callable[[Token], object] | None = None,
    ) -> Answer:
        """Answer a request in its turn; the guard's policy chooses the setting, the native one without a guard.

        `cancel` is called while waiting and between pieces of work, in company by the thread that works for all;
        `on_token` gets the tokens as they come, while others wait.
        """
        guard, accepted_ms = guard or self.native, now_ms() - request.waited_ms
        asked = Asked(request, guard, accepted_ms, cancel, on_token)
        opened: Opened | None = None
        if self.has_company and not self.door.is_inside:
            assert self.company is not None
            ask = self.company.answer if request.budget_ms is None else self.company.try_to_answer
            found = ask(asked)
            if isinstance(found, Answer):
                return found
            opened = found
        return self.answer_alone(asked, opened)

    def answer_alone(self, asked: Asked, opened: Opened | None = None) -> Answer:
        """Answer a request in its turn at the door; its picture may be `opened`."""
        try:
            ticket = self.line_up(asked.request, asked.accepted_ms, asked.guard, is_open=opened is not None)
            return self.answer_in_turn(asked.request, asked.guard, ticket, asked.cancel, asked.on_token, opened)
        finally:
            if opened is not None:
                opened.close()

    @property
    def has_company(self) -> bool:
        """Whether a request that comes now is one of several; between two pieces of work nobody is at the door."""
        return self.company is not None and (self.door.is_busy or self.company.callers > 0)

    def line_up(
        self,
        request: Request,
        accepted_ms: float | None = None,
        guard: Guard | None = None,
        *,
        is_open: bool = False,
    ) -> Ticket:
        """Take the request's place at the door; its clock began at `accepted_ms`, by default now.

        The `guard` says how long it needs at least, with its picture's opening unless it `is_open`; those before
        leave it that.

        Raises:
            UserError: too many wait.
        """
        accepted_ms = now_ms() - request.waited_ms if accepted_ms is None else accepted_ms
        budget_ms = math.inf if request.budget_ms is None else request.budget_ms
        least_ms = 0.0 if guard is None or guard.profile is None else max(0.0, guard.least_ms())
        if guard is not None and request.images and not is_open:
            least_ms += guard.opening_ms
        runs_over = request.on_deadline == "finish"
        return self.door.line_up(accepted_ms, accepted_ms + budget_ms, least_ms, runs_over=runs_over)

    def answer_in_turn(
        self,
        request: Request,
        guard: Guard,
        ticket: Ticket,
        cancel: Callable[[], bool] | None = None,
        on_token: Callable[[Token], object] | None = None,
        opened: Opened | None = None,
    ) -> Answer:
        """Answer a request when its ticket's turn comes; `on_token` gets its tokens as they come, inside.

        A picture that is `opened` is not opened there.
        """
        watch = Watch(request, ticket.accepted_ms, self.pieces, cancel)
        items = self._run(request, guard, watch, opened)
        answer = None
        with self._inside(ticket, watch):
            for item in items:
                if on_token is not None and isinstance(item, Token):
                    on_token(item)
                answer = item
        assert isinstance(answer, Answer)
        if self.company is not None:
            outside_ms = answer.timings_ms["queue"] + (0.0 if opened is None else opened.took_ms)
            self.company.learn(answer.timings_ms["total"] - outside_ms)
        return answer

    def stream(
        self, request: Request, guard: Guard | None = None, cancel: Callable[[], bool] | None = None
    ) -> Generator[Token | Answer, None, None]:
        """Yield tokens as they come and the answer last; the clock starts with this call.

        `cancel` is called while waiting and between pieces of work; if it returns True, the answer ends there.
        """
        watch = Watch(request, now_ms() - request.waited_ms, self.pieces, cancel)
        return self._stepped(request, guard or self.native, watch)

    @contextmanager
    def _inside(self, ticket: Ticket, watch: Watch) -> Iterator[None]:
        """Wait at the door, and compute in the block; a request that ends while it waits comes in to say so."""
        is_over = None if watch.is_idle else lambda: watch.reason() is not None
        with self.door.enter(ticket, is_over) as has_lane, self.computing() if has_lane else nullcontext():
            yield

    def _stepped(self, request: Request, guard: Guard, watch: Watch) -> Generator[Token | Answer, None, None]:
        """The items; only while one is being made is a stream inside the door, and computes."""
        with closing(self._run(request, guard, watch)) as items:
            needs: Guard | None = guard  # which after the first token are no longer those of a whole answer
            while True:
                with self._inside(self.line_up(request, watch.accepted_ms, needs), watch):
                    item = next(items, None)
                if item is None:
                    return
                needs = None
                yield item

    def _run(
        self, request: Request, guard: Guard, watch: Watch, opened: Opened | None = None
    ) -> Generator[Token | Answer, None, None]:
        """Answer a request: tokens as they come, and the answer last."""
        run, sample = self.runner, sampler_for(request, self.device)
        clock = stage_clock(self.device, now_ms() - watch.accepted_ms)
        watch.go_by(clock.elapsed_ms)
        work = Work(self, request, guard, clock, watch, opened)
        try:
            choice, ready = work.look()
            with run.lane() as lane:
                plan = self._plans[choice.knobs]
                ticks = watch.ticks("prefill", len(ready.prompt.tokens))
                state = run.prefill(ready.prompt, work.vision, plan, request.max_new_tokens, lane, ticks)
                token = sample(run.limits([request])(state.logits))
                transcript = work.transcript
                steps = run.steps(token, state, sample, request)  # prepared while the device reads the prompt
                first = transcript.add(int(token))
                clock.mark("prefill")
                yield from first
                while not transcript.finish:
                    reason = watch.reason(choice.step_ms)
                    if reason is not None:
                        work.stop(reason, "decode")
                        break
                    made = next(steps)
                    next_token = transcript.add(made.token)
                    clock.mark("decode", made.event)
                    yield from next_token
        except Interrupted as end:
            clock.mark(end.stage)
            work.stop(end.reason, end.stage)
        reading = work.read()
        yield from work.transcript.settled()
        answer = work.answer(reading)
        guard.observe(answer, next((lap.duration_ms for lap in reading.laps if lap.stage == "preprocess"), 0.0))
        yield answer
        if work.stopped_at is None:  # a request that ended at the door has no turn to capture in
            run.settle(self._is_quiet)

    def _is_quiet(self) -> bool:
        """Whether nobody waits for this engine, at the door or among others."""
        return not self.door.waiting and (self.company is None or not self.company.callers)
