"""Requests that are in flight together: one thread feeds the device with the work of them all.

Callers prepare their requests in their own threads, on a stream beside the one that answers, and wait. One thread
takes those that are ready, encodes their pictures together, reads the prompts of equal plans in one pass, and
decodes them in rows (`engine/cuda/rows.py`): who is ready takes a free row between two steps. Answers that are
drawn, or too long for a row, are decoded one after the other. Between these pieces of work it passes the door
again, so that a request with a deadline waits for one piece at most. Nothing is captured here, and nothing waits
for Python's lock while the device computes.

A request with a budget joins if it and all others are expected in time, by what a calibration measured of requests
in flight together (`control/joining.py`); otherwise it passes the door alone. One without a budget waits while it
would make others late.

A request that comes while nobody is in flight is not answered here: alone it is faster on its caller's thread.
"""

from __future__ import annotations

import atexit
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, compress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tempovlm.control.guard import Guard
from tempovlm.control.joining import Forecast, Need, ahead_ms, may_join, slack_ms
from tempovlm.control.queue import PATIENCE_MS, check_waiting
from tempovlm.core.errors import UserError
from tempovlm.core.plan import Step
from tempovlm.core.request import Answer, Request
from tempovlm.core.units import now_ms
from tempovlm.engine.company.ahead import Opened, Room
from tempovlm.engine.company.member import Asked, Member
from tempovlm.engine.company.seats import Seat, Seats
from tempovlm.engine.cuda.rows import PACK_BUCKETS
from tempovlm.engine.cuda.vision_graphs import MAX_CROPS
from tempovlm.engine.runner import Decoding, Runner
from tempovlm.engine.sampling import greedy
from tempovlm.latency.clock import QUEUE, StageClock, stage_clock
from tempovlm.model.cache import KVCache
from tempovlm.model.decoder import is_plain
from tempovlm.model.packed import read_packed
from tempovlm.model.vision.encoder import only_live
from tempovlm.model.vision.tiling import Crops

if TYPE_CHECKING:
    from tempovlm.engine.engine import Engine
    from tempovlm.latency.profile import LatencyProfile

MOST_TOGETHER = 8
"""Requests whose pictures and prompts are read in one turn; others wait for the next one."""

TURN_TOKENS = 4096
"""Tokens of a turn's prompts: beyond, the experts' products are bound by arithmetic, and more only delay."""

LONG_TOKENS = PACK_BUCKETS[-1] // 2
"""Longer prompts are read alone: two of them have no graph."""

FEW = 2
"""So many answers are decoded faster one after the other on the lane than in rows."""

LINGER_S = 1.0
"""Time after which the device's thread ends if nobody comes, seconds."""

PREPARING = 2
"""Requests that are prepared at a time: more would hold Python's lock while the device waits for its thread."""

LOOK_S = 0.001
"""Time between two looks at whether tokens are there while requests may come, seconds."""

LAST_ALONE = 16
"""Answers given alone by which the waiting for others of them is estimated."""

EXIT_S = 10.0
"""Most time that the end of the process waits for the piece of work that the device's thread is at, seconds."""

ENDING = "the process ends, and with it the answers that others wait for"


@dataclass(frozen=True, slots=True)
class Read:
    """A member whose picture is encoded, (C, G, D); its prompt too, if it was read in a pack.

    Attributes:
        clocks: of the stages that it shared.
        state: after the prompt, in a cache of its own. token: (1,) the first one.
    """

    member: Member
    vision: Tensor | None
    clocks: tuple[StageClock, ...]
    state: Decoding | None = None
    token: Tensor | None = None


class Company:
    """Answers requests of one engine together.

    Attributes:
        room: for pictures that are opened before their requests' turns.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self.room = engine, Room()
        self._changed, self._called = threading.Condition(), threading.Condition()
        self._preparing = threading.Semaphore(PREPARING)
        self._pending: deque[Member] = deque()
        self._taken: list[Member] = []
        self._alone_ms: deque[float] = deque(maxlen=LAST_ALONE)
        self._thread: threading.Thread | None = None
        self._is_over, self._num_callers, self._process = False, 0, os.getpid()
        _OPEN.add(self)
        graphs = engine.runner.graphs
        self._side = torch.cuda.Stream(engine.device) if engine.device.type == "cuda" else None
        self._seats = None if graphs is None or graphs.rows is None else Seats(graphs.rows)

    @classmethod
    def of(cls, engine: Engine) -> Company | None:
        """Return the company of an engine on CUDA; None where answers alone are as fast."""
        run = engine.runner
        return cls(engine) if run.graphs is not None and is_plain(run.model.decoder) else None

    def answer(self, asked: Asked) -> Answer:
        """Answer one request among others."""
        with self._calling():
            return self._join(asked).answer()

    def try_to_answer(self, asked: Asked) -> Answer | Opened | None:
        """Answer a request with a budget among others.

        Returns:
            Its picture, open, if it or another one would be late; None if there is no room, or it is late already.
        """
        if asked.is_late:
            return None
        opened = Opened.of(self._engine.runner, asked.request, self.room)
        try:
            with self._calling():
                answer = self._answer_if_in_time(asked, opened)
        except BaseException:
            if opened is not None:
                opened.close()
            raise
        return opened if answer is None else answer

    def _answer_if_in_time(self, asked: Asked, opened: Opened | None) -> Answer | None:
        """Answer a request with a budget among others; None if it, or another one, would be late."""
        member = self._prepare(asked, opened) if self._may_ask(asked) else None
        if member is None or not self._admit(member):
            return None
        if opened is not None:
            opened.close()
        return member.answer()

    def answer_all(self, requests: Iterable[tuple[Request, Guard]]) -> list[Answer]:
        """Answer several requests together, each decided about by its guard; in their order."""
        accepted_ms, requests = now_ms(), list(requests)
        with self._calling(len(requests)):
            members = [self._join(Asked(one, guard, accepted_ms - one.waited_ms)) for one, guard in requests]
            answers = [member.answer() for member in members]
            members.clear()
        return answers

    def learn(self, alone_ms: float) -> None:
        """Remember how long an answer alone took, without its waiting."""
        self._alone_ms.append(alone_ms)

    @property
    def has_rows(self) -> bool:
        """Whether answers are decoded together."""
        return self._seats is not None

    @property
    def callers(self) -> int:
        """Requests that are prepared, wait or run."""
        return self._num_callers

    def _join(self, asked: Asked) -> Member:
        """Prepare a request, and pass it to the device's thread."""
        check_waiting(len(self._pending))
        member = self._prepare(asked)
        with self._changed:
            self._append(member)
        return member

    def _prepare(self, asked: Asked, opened: Opened | None = None) -> Member:
        with self._engine.computing(), torch.cuda.stream(self._side):
            return Member(self._engine, asked, self._preparing, self._outlook, opened)

    def _append(self, member: Member) -> None:
        """Pass a member to the device's thread: before those without a deadline, if it has one."""
        if self._is_over:
            member.fail(UserError(ENDING))
            return
        place = len(self._pending)
        while member.has_deadline and place and not self._pending[place - 1].has_deadline:
            place -= 1
        self._pending.insert(place, member)
        self._forecast(member.profile)
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="tempovlm-device", daemon=True)
            self._thread.start()
        self._changed.notify()

    def _forecast(self, profile: LatencyProfile | None) -> None:
        """Tell all who are in flight, of whom one has just joined, when they end if no other one does.

        It is by calibrated times alone, so that what was learned meanwhile does not count twice; nothing is
        foreseen beside one whose times were not measured.
        """
        members = [one for one in (*self._taken, *self._pending) if not one.is_done]
        sharing = None if profile is None else profile.sharing(len(members))
        needs, forecast = [one.need.calibrated for one in members], None
        if sharing is not None and all(one.is_known for one in needs):
            forecast = Forecast.of(needs, sharing, now_ms())
        for one in members:
            one.expect(forecast)

    def _in_flight(self, *, everybody: bool = False) -> list[Need]:
        """Return the needs of those taken, and of those who wait: all of them, or who may not be put off."""
        with self._changed:
            self._taken = [one for one in self._taken if not one.is_done]
            waiting = [one for one in self._pending if everybody or one.has_deadline]
            return [one.need for one in (*self._taken, *waiting)]

    def _outlook(self, request: Request, guard: Guard) -> tuple[Guard, float]:
        """Return who decides about a request that joins now, and how long it waits for others; 0 if unknown.

        Each at the door may take as long as the slowest of the last ones did; at first, as the native setting.
        """
        profile = guard.profile
        if profile is None or not profile.shared:
            return guard, 0.0
        needs = self._in_flight(everybody=request.budget_ms is None)
        among, sharing = guard.among(len(needs) + 1), profile.sharing(len(needs) + 1)
        if among is None or sharing is None:
            return guard, 0.0
        thread = self._thread
        strangers = self._engine.door.strangers(None if thread is None else thread.ident)
        alone_ms = max(self._alone_ms, default=profile.upper_total_ms(guard.space.index(guard.space.native)))
        return among, ahead_ms(needs, sharing) + strangers * alone_ms

    def _may_ask(self, asked: Asked) -> bool:
        """Whether it makes sense to prepare a request with a budget: it may stand beside others, if in time."""
        request, guard = asked.request, asked.guard
        if self._seats is None or request.temperature or guard.policy.sees_picture or guard.policy.sees_glance:
            return False
        among, waits_ms = self._outlook(request, guard)
        assert request.budget_ms is not None
        return (
            among is not guard and now_ms() - asked.accepted_ms + waits_ms + among.least_ms() <= request.budget_ms
        )

    def _admit(self, member: Member) -> bool:
        """Pass a member to the device's thread, if nobody is late by that."""
        with self._changed:
            is_welcome = member.is_expected and self._seats is not None and self._seats.fits(member)
            if is_welcome and not self._makes_late(member):
                self._append(member)
                return True
        return False

    def _makes_late(self, member: Member) -> bool:
        """Whether a member that is not counted yet would be late, or make others late."""
        needs, profile = self._in_flight(), member.profile
        before, after = (None if profile is None else profile.sharing(len(needs) + more) for more in (0, 1))
        if before is None or after is None:
            return any(one.deadline_ms < math.inf for one in (*needs, member.need))
        return not may_join(needs, member.need, before, after, now_ms())

    def _slack_ms(self) -> float:
        """Return how long the work may rest before a member is late; infinite where none has a deadline."""
        with self._changed:
            profile = next((one.profile for one in (*self._taken, *self._pending) if one.has_deadline), None)
        if profile is None:
            return math.inf
        needs = self._in_flight()
        sharing = profile.sharing(len(needs))
        return math.inf if sharing is None else slack_ms(needs, sharing, now_ms())

    @contextmanager
    def _calling(self, count: int = 1) -> Iterator[None]:
        """Context of a caller of some requests, from their preparation to their answers."""
        with self._called:
            if self._is_over:
                raise UserError(ENDING)
            self._num_callers += count
        try:
            yield
        finally:
            with self._called:
                self._num_callers -= count
                self._called.notify_all()

    def end(self) -> None:
        """Fail those who wait; return when neither the device's thread nor a caller is here."""
        if os.getpid() != self._process:  # a fork's child: neither is there
            return
        with self._changed:
            self._is_over, thread = True, self._thread
            self._changed.notify()
        if thread is not None:
            thread.join(EXIT_S)
        with self._called:
            self._called.wait_for(lambda: not self._num_callers, EXIT_S)

    def _serve(self) -> None:
        """Answer until nobody comes."""
        while self._has_work():
            group: list[Member] = []
            try:
                if self._pending and self._room():
                    with self._turn(self._pending[0]):
                        group = self._take()
                        reads = self._read(group) if group else []
                    for one in reads:
                        self._finish(one)
                elif self._seats is not None and self._seats.may_start:
                    with self._turn(self._seats.members[0]):
                        self._seats.start()
                else:
                    self._rest()
            except BaseException as error:  # noqa: BLE001 - the callers raise it
                seated = [] if self._seats is None else self._seats.clear()
                for member in [*group, *seated] or self._take():
                    member.fail(error)

    def _rest(self) -> None:
        """Read the tokens that are there; otherwise wait for some, or a while if somebody may come."""
        seats = self._seats
        if seats is not None and seats.collect():
            return
        is_one_prepared = not self._pending and self._num_callers > (0 if seats is None else len(seats.members))
        if seats is not None and seats.members and not is_one_prepared:
            seats.wait()
            return
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._is_over, LOOK_S)

    def _room(self) -> int:
        """Requests that can be read now; none while the next one would make others late."""
        with self._changed:
            if self._pending and self._is_put_off(self._pending[0]):
                return 0
        return MOST_TOGETHER if self._seats is None else min(len(self._seats.rows.free), MOST_TOGETHER)

    def _is_put_off(self, member: Member) -> bool:
        """Whether a member without a deadline waits, for some time at most, for those that have one."""
        if member.has_deadline or not any(one.has_deadline for one in self._taken if not one.is_done):
            return False
        return now_ms() - member.accepted_ms < PATIENCE_MS and self._makes_late(member)

    def _has_work(self) -> bool:
        if self._is_over:
            self._dismiss()
            return False
        if self._seats is not None and self._seats.members:
            return True
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._is_over, LINGER_S)
            if not self._pending:
                self._thread = None
            return bool(self._pending)

    def _dismiss(self) -> None:
        """Fail all who are here."""
        seated = [] if self._seats is None else self._seats.clear()
        with self._changed:
            for member in [*seated, *self._pending]:
                member.fail(UserError(ENDING))
            self._pending.clear()

    def _take(self) -> list[Member]:
        """Take those that are ready, in their order, for one turn, which has room for one at least.

        Returns:
            Those of them whose answers are still wanted.
        """
        group: list[Member] = []
        with self._changed:
            self._taken = [one for one in self._taken if not one.is_done]
            while self._pending and len(group) < self._room():
                if group and sum(map(len, [*group, self._pending[0]])) > TURN_TOKENS:
                    break
                group.append(self._pending.popleft())
                self._taken.append(group[-1])
        return [one for one in group if not one.ends_unread()]

    @contextmanager
    def _turn(self, member: Member) -> Iterator[None]:
        """Context of a piece of work, at the door as urgent as a member."""
        door = self._engine.door
        ticket = door.line_up(member.accepted_ms, now_ms() + self._slack_ms())
        with door.enter(ticket), self._engine.computing():
            yield

    @torch.inference_mode()
    def _read(self, group: Sequence[Member]) -> list[Read]:
        """Encode all pictures, and read the prompts that can share a pass; start the work and wait for nothing.

        Returns:
            Those whose answers are decoded alone.
        """
        run, device = self._engine.runner, self._engine.device
        for member in group:
            member.hand_over()
        clock = stage_clock(device)
        crops = [member.ready.crops for member in group]
        patches = encode_together(run, crops)
        clock.mark("vision_encoder")
        vision = project_together(run, patches, crops)
        clock.mark("projector")
        reads = [Read(member, seen, (clock,)) for member, seen in zip(group, vision, strict=True)]
        if self._seats is None:
            return [one for pack in packs(reads) for one in (self._read_pack(pack) if len(pack) > 1 else pack)]
        are_few = self._num_callers <= FEW and not self._seats.members
        can_sit = [not are_few and self._seats.fits(one.member) for one in reads]
        for pack in packs(compress(reads, can_sit)):
            plan, total = pack[0].member.plan, sum(len(one.member) for one in pack)
            is_one = len(pack) == 1 or self._seats.rows.reads_at_once(plan, total)
            for part in [pack] if is_one else [[one] for one in pack]:
                self._seat(part, self._seats)
        return [one for one, sits in zip(reads, can_sit, strict=True) if not sits]

    def _seat(self, pack: Sequence[Read], seats: Seats) -> None:
        """Read the prompts of equal plans in one pass, each into a row, and begin their answers."""
        run, clock, plan = self._engine.runner, stage_clock(self._engine.device), pack[0].member.plan
        rows = seats.rows.free[: len(pack)]
        if len(pack) > 1:
            logits = seats.rows.read(embed(run, pack), rows, plan)
        else:  # the lane has graphs for closer lengths
            request, prompt = pack[0].member.request, pack[0].member.ready.prompt
            with run.lane() as lane:
                state = run.prefill(prompt, pack[0].vision, plan, request.max_new_tokens, lane)
            logits = state.logits
            seats.rows.copy_in(rows[0], state.cache, plan, state.length)
        clock.mark("prefill")
        limits = run.limits([one.member.request for one in pack])
        first = greedy(limits(logits))
        taken = [Seat(one.member, row, (*one.clocks, clock)) for one, row in zip(pack, rows, strict=True)]
        seats.join(taken, first, limits.second(first))

    def _read_pack(self, pack: Sequence[Read]) -> list[Read]:
        """Read the prompts of equal plans in one pass, each into a cache of its own."""
        run, clock = self._engine.runner, stage_clock(self._engine.device)
        plan, embedded = pack[0].member.plan, embed(run, pack)
        caches = [
            KVCache.allocate(run.model.config, len(plan.steps), 1, len(x) + one.member.request.max_new_tokens, x)
            for x, one in zip(embedded, pack, strict=True)
        ]
        decoder = run.model.decoder
        assert is_plain(decoder)
        every = read_packed(decoder, embedded, plan, caches)
        clock.mark("prefill")
        read = []
        for one, x, cache, logits in zip(pack, embedded, caches, every.split(1), strict=True):
            state = Decoding(logits, plan, cache, len(x))
            read.append(replace(one, clocks=(*one.clocks, clock), state=state, token=first_token(run, one, state)))
        return read

    def _finish(self, one: Read) -> None:
        """Decode a member's answer on the lane, and wake its caller."""
        member, run = one.member, self._engine.runner
        try:
            with self._turn(member):
                clock = stage_clock(self._engine.device)
                start_ms = now_ms()
                with run.lane() as lane:
                    if one.state is None or one.token is None:
                        request, prompt = member.request, member.ready.prompt
                        state = run.prefill(prompt, one.vision, member.plan, request.max_new_tokens, lane)
                        token = first_token(run, one, state)
                    elif lane is not None:
                        own = lane.take_over(one.state.cache, member.plan, one.state.length)
                        state, token = replace(one.state, cache=own, lane=lane), one.token
                    else:
                        state, token = one.state, one.token
                    self._decode(member, state, token, clock, is_read=one.state is not None)
                reading = clock.read()
                member.spent(*(shared.read() for shared in one.clocks), reading)
            member.finish(start_ms + reading.total_ms)
        except BaseException as error:  # noqa: BLE001 - the caller raises it
            member.fail(error)

    def _decode(self, member: Member, state: Decoding, token: Tensor, clock: StageClock, *, is_read: bool) -> None:
        """Add all tokens to the member's answer; the clock is marked after each that was made here."""
        steps = self._engine.runner.steps(token, state, member.sample, member.request)
        is_over = member.add(int(token))
        clock.mark(QUEUE if is_read else "prefill")
        while not is_over:
            made = next(steps)
            is_over = member.add(made.token)
            clock.mark("decode", made.event)


_OPEN: weakref.WeakSet[Company] = weakref.WeakSet()


@atexit.register
def end_all() -> None:
    """End the threads of all devices before the interpreter does.

    A thread that takes Python's lock after that is ended where it is; within torch, as when a tensor is freed,
    that ends the whole process (`std::terminate`).
    """
    for company in list(_OPEN):
        company.end()


def packs(reads: Iterable[Read]) -> list[list[Read]]:
    """Sort members by the steps of their plans, into packs that a graph can have; long prompts stay apart."""
    of_steps: dict[tuple[Step, ...], list[Read]] = {}
    found = []
    for one in reads:
        steps = one.member.plan.steps
        pack = of_steps.get(steps, [])
        if len(one.member) > LONG_TOKENS:
            found.append([one])
        elif pack and sum(len(other.member) for other in pack) + len(one.member) <= PACK_BUCKETS[-1]:
            pack.append(one)
        else:
            of_steps[steps] = [one]
            found.append(of_steps[steps])
    return found


def embed(run: Runner, pack: Sequence[Read]) -> list[Tensor]:
    """Return embeddings (T, D) of the prompts of a pack, with their pictures."""
    prompts = [(one.member.ready.prompt, one.vision) for one in pack]
    return run.model.embed_packed([(prompt.tokens, seen, prompt.slots) for prompt, seen in prompts])


def first_token(run: Runner, one: Read, state: Decoding) -> Tensor:
    """Return the first token (1,) of an answer."""
    return one.member.sample(run.limits([one.member.request])(state.logits))


def encode_together(run: Runner, crops: Sequence[Crops | None]) -> list[Tensor | None]:
    """Encode the distinct crops of all pictures; return features (U, P, F) of each picture."""
    pictures = [one for one in crops if one is not None]
    if not pictures or run.features is not None:
        return [run.encode(one) for one in crops]
    patches = [one.patches.to(run.device, non_blocking=True) for one in pictures]
    counts = [len(one) for one in patches]
    if run.vision is not None and sum(counts) <= MAX_CROPS:
        every = run.vision.encode.together(patches)
    else:
        stage = run.see_crops if run.vision is None else run.vision.encode
        every = in_chunks(stage, torch.cat(patches).to(run.dtype))
    parts = iter(every.split(counts))
    return [None if one is None else _live(next(parts), one) for one in crops]


def _live(features: Tensor, crops: Crops) -> Tensor:
    return only_live(features, None if crops.live is None else crops.live.to(features.device, non_blocking=True))


def project_together(
    run: Runner, features: Sequence[Tensor | None], crops: Sequence[Crops | None]
) -> list[Tensor | None]:
    """Project all crops of all pictures; return tokens (C, G, D) of each picture."""
    if run.vision is None:
        return [run.project(*one) for one in zip(features, crops, strict=True)]
    pictures = [(f, c) for f, c in zip(features, crops, strict=True) if f is not None and c is not None]
    if not pictures:
        return [None] * len(crops)
    index, masks = _of_all(tuple((c.index, c.masks, len(f)) for f, c in pictures), run.device)
    every = torch.cat([f for f, _ in pictures]) if len(pictures) > 1 else pictures[0][0]
    if len(index) != len(every):
        every = every.index_select(0, index)
    parts = iter(in_chunks(run.vision.project, every, masks).split([len(c.index) for _, c in pictures]))
    return [None if one is None else next(parts) for one in crops]


@lru_cache(maxsize=64)
def _of_all(pictures: tuple[tuple[Tensor, Tensor, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return index (C,) and masks (C, P) of all crops of some pictures, from those of each and its distinct crops.

    Kept for pictures with the same tensors, which all of one shape have.
    """
    begins = accumulate((count for *_, count in pictures), initial=0)
    index = [own.to(device) + begin for (own, *_), begin in zip(pictures, begins, strict=False)]
    return torch.cat(index), torch.cat([masks.to(device) for _, masks, _ in pictures])


def in_chunks(stage: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """Run a stage on values whose first dimension is crops, as many at a time as have a graph."""
    made = [stage(*chunk) for chunk in zip(*(value.split(MAX_CROPS) for value in values), strict=True)]
    return made[0] if len(made) == 1 else torch.cat(made)
