"""Requests that are in flight together: one thread feeds the device with the work of them all.

Callers prepare their requests in their own threads, on a stream beside the one that answers, and wait. One thread
takes those that are ready, encodes their pictures together, reads the prompts of equal plans in one pass, and
decodes them in rows (`engine/cuda/rows.py`): who is ready takes a free row between two steps. Answers that are
drawn, or too long for a row, are decoded one after the other. Between these pieces of work it passes the door
again, so that a request with a deadline waits for one piece at most. Nothing is captured here, and nothing waits
for Python's lock while the device computes.

A request with a budget joins if it and all others are expected in time, by what a calibration measured of requests
in flight together (`control/joining.py`); otherwise it passes the door alone. One without a budget waits while it
would make others late. One whose policy sees the picture joins by what it would choose without it, and chooses by
the pooled picture before its prompt is read, while the device works for others: what would make another one late
that is in time without it does not replace the setting that it was let in with.

A request that comes while nobody is in flight is not answered here: alone it is faster on its caller's thread.
"""

from __future__ import annotations

import atexit
import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import compress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tempovlm.control.guard import Choice, Guard
from tempovlm.control.joining import Forecast, ahead_ms, may_become, may_join, narrowest, slack_ms
from tempovlm.control.policy import Sight
from tempovlm.control.queue import PATIENCE_MS, check_waiting
from tempovlm.core.errors import UserError
from tempovlm.core.request import Answer, Request
from tempovlm.core.units import now_ms
from tempovlm.engine.company.ahead import Opened, Room
from tempovlm.engine.company.batch import Batch
from tempovlm.engine.company.looks import Look
from tempovlm.engine.company.member import Asked, Member, Outlook
from tempovlm.engine.company.seats import Seat, Seats
from tempovlm.engine.company.together import (
    Read,
    embed,
    encode_together,
    first_token,
    packs,
    project_together,
)
from tempovlm.engine.runner import Decoding
from tempovlm.engine.sampling import greedy
from tempovlm.latency.clock import QUEUE, StageClock, stage_clock
from tempovlm.model.cache import KVCache
from tempovlm.model.decoder import is_plain
from tempovlm.model.packed import read_packed

if TYPE_CHECKING:
    from tempovlm.engine.engine import Engine
    from tempovlm.latency.profile import LatencyProfile

MOST_TOGETHER = 8
"""Requests whose pictures and prompts are read in one turn; others wait for the next one."""

TURN_TOKENS = 4096
"""Tokens of a turn's prompts: beyond, the experts' products are bound by arithmetic, and more only delay."""

MOST_LOOKS = 2
"""Turns whose members wait to choose by their pictures: while one looks, the next one's pictures are encoded."""

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
        self._looks: deque[Look] = deque()
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
        with self.calling():
            return self.join(asked).answer()

    def try_to_answer(self, asked: Asked) -> Answer | Opened | None:
        """Answer a request with a budget among others.

        Returns:
            Its picture, open, if it or another one would be late; None if there is no room, or it is late already.
        """
        if asked.is_late:
            return None
        opened = Opened.of(self._engine.runner, asked.request, self.room)
        try:
            with self.calling():
                member = self.offer(asked, opened)
                if member is None:
                    return opened
                if opened is not None:
                    opened.close()
                return member.answer()
        except BaseException:
            if opened is not None:
                opened.close()
            raise

    def answer_all(self, requests: Iterable[tuple[Request, Guard]]) -> list[Answer]:
        """Answer several requests together, each decided about by its guard; in their order."""
        return Batch(self, self._engine, requests).answers()

    def offer(self, asked: Asked, opened: Opened | None) -> Member | None:
        """Prepare a request with a budget, and pass it to the device's thread; None if it, or one, would be late.

        Raises:
            UserError: the picture cannot be read, or the prompt is too long.
        """
        member = self._prepare(asked, opened) if self.takes(asked) and self._may_be_in_time(asked) else None
        return None if member is None or not self._admit(member) else member

    def join(self, asked: Asked) -> Member:
        """Prepare a request, and pass it to the device's thread, whoever is late."""
        check_waiting(len(self._pending))
        member = self._prepare(asked)
        with self._changed:
            self._append(member)
        return member

    def takes(self, asked: Asked) -> bool:
        """Whether requests like it may stand beside others: greedy ones, whose times among others are known."""
        profile, policy = asked.guard.profile, asked.guard.policy
        is_known = profile is not None and bool(profile.shared) and not policy.sees_glance
        return self._seats is not None and not asked.request.temperature and is_known

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

    @contextmanager
    def calling(self, count: int = 1) -> Iterator[None]:
        """Context of a caller of some requests, from their preparation to their answers."""
        with self._called:
            if self._is_over and count > 0:
                raise UserError(ENDING)
            self._num_callers += count
        try:
            yield
        finally:
            with self._called:
                self._num_callers -= count
                self._called.notify_all()

    def calling_less(self, count: int) -> AbstractContextManager[None]:
        """Context in which some requests of a caller are not on their way, or are answered already."""
        return self.calling(-count)

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

    def _in_flight(self, *, everybody: bool = False, but: Member | None = None) -> list[Member]:
        """Return those taken, and those who wait: all of them, or who may not be put off; but for one."""
        with self._changed:
            self._taken = [one for one in self._taken if not one.is_done]
            waiting = [one for one in self._pending if everybody or one.has_deadline]
            return [one for one in (*self._taken, *waiting) if one is not but]

    def _outlook(self, asked: Asked, but: Member | None = None) -> Outlook:
        """Return what a request goes by that joins now, or is in flight; unknown times make it that of one alone.

        Each at the door may take as long as the slowest of the last ones did; at first, as the native setting.
        """
        guard, profile = asked.guard, asked.guard.profile
        if profile is None or not profile.shared:
            return Outlook(guard)
        members = self._in_flight(everybody=asked.request.budget_ms is None, but=but)
        among, sharing = guard.among(len(members) + 1), profile.sharing(len(members) + 1)
        if among is None or sharing is None:
            return Outlook(guard)
        thread = self._thread
        strangers = self._engine.door.strangers(None if thread is None else thread.ident)
        alone_ms = max(self._alone_ms, default=profile.upper_total_ms(guard.space.index(guard.space.native)))
        waits_ms = ahead_ms([one.need for one in members], sharing) + strangers * alone_ms
        begin_ms, coming = now_ms() + waits_ms, set(asked.rest) - {one.asked for one in members}
        ends_ms = [one.deadline_ms for one in asked.rest if one in coming and one.can_begin(begin_ms)]
        turns, common_ms = narrowest([asked.deadline_ms, *ends_ms], begin_ms)
        if turns == 1:
            return Outlook(among, waits_ms)
        most = max(one.in_flight for one in profile.shared)
        return Outlook(among, waits_ms, guard.among(min(len(members) + turns, most), turns), common_ms)

    def _may_be_in_time(self, asked: Asked) -> bool:
        """Whether it makes sense to prepare a request with a budget."""
        view = self._outlook(asked)
        ready_ms = now_ms() + view.ahead_ms + view.guard.least_ms()
        return view.guard is not asked.guard and ready_ms <= asked.deadline_ms

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
        needs, profile = [one.need for one in self._in_flight()], member.profile
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
        needs = [one.need for one in self._in_flight()]
        sharing = profile.sharing(len(needs))
        return math.inf if sharing is None else slack_ms(needs, sharing, now_ms())

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
                if self._looks and self._looks[0].is_there:
                    group = self._looks[0].members
                    self._go_on(self._looks.popleft())
                elif self._pending and self._room():
                    with self._turn(self._pending[0]):
                        group = self._take()
                        reads = self._read(self._encode(group)) if group else []
                    for one in reads:
                        self._finish(one)
                elif self._seats is not None and self._seats.may_start:
                    with self._turn(self._seats.members[0]):
                        self._seats.start()
                else:
                    self._rest()
            except BaseException as error:  # noqa: BLE001 - the callers raise it
                for member in [*group, *self._clear()] or self._take():
                    member.fail(error)

    def _rest(self) -> None:
        """Read the tokens that are there; otherwise wait for some, or a while if somebody may come."""
        seats = self._seats
        if seats is not None and seats.collect():
            return
        if self._looks and (seats is None or not seats.awaits(self._looks[0].ahead)):
            self._looks[0].wait()
            return
        is_one_prepared = not self._pending and self._num_callers > (0 if seats is None else len(seats.members))
        if seats is not None and (self._looks or (seats.members and not is_one_prepared)):
            seats.wait()
            return
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._is_over, LOOK_S)

    def _room(self) -> int:
        """Requests that can be read now; none while the next one would make others late."""
        if len(self._looks) >= MOST_LOOKS:
            return 0
        with self._changed:
            if self._pending and self._is_put_off(self._pending[0]):
                return 0
        looking = sum(len(one.reads) for one in self._looks)
        return MOST_TOGETHER if self._seats is None else min(len(self._seats.rows.free) - looking, MOST_TOGETHER)

    def _is_put_off(self, member: Member) -> bool:
        """Whether a member without a deadline waits, for some time at most, for those that have one."""
        if member.has_deadline or not any(one.has_deadline for one in self._taken if not one.is_done):
            return False
        return now_ms() - member.accepted_ms < PATIENCE_MS and self._makes_late(member)

    def _has_work(self) -> bool:
        if self._is_over:
            with self._changed:
                for member in [*self._clear(), *self._pending]:
                    member.fail(UserError(ENDING))
                self._pending.clear()
            return False
        if self._looks or (self._seats is not None and self._seats.members):
            return True
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._is_over, LINGER_S)
            if not self._pending:
                self._thread = None
            return bool(self._pending)

    def _clear(self) -> list[Member]:
        """Give up all rows and looks; return whose they were."""
        members = [member for look in self._looks for member in look.members]
        self._looks.clear()
        return members if self._seats is None else [*members, *self._seats.clear()]

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
    def _encode(self, group: Sequence[Member]) -> list[Read]:
        """Encode all pictures; start the work and wait for nothing.

        Returns:
            Those whose prompts can be read; the others look at their pictures first.
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
        looking = [one for one in reads if one.member.looks]
        if looking:
            self._looks.append(Look.at(run, looking, None if self._seats is None else self._seats.last))
        return [one for one in reads if not one.member.looks]

    def _go_on(self, look: Look) -> None:
        """Let members choose by their pictures, and read the prompts of those whose answers are still wanted."""
        reads = [one for one, sight in zip(look.reads, look.sights, strict=True) if self._chooses(one, sight)]
        if reads:
            with self._turn(reads[0].member):
                reads = self._read(reads)
        for one in reads:
            self._finish(one)

    def _chooses(self, one: Read, sight: Sight) -> bool:
        """Let a member choose by its picture; return whether its answer is still wanted."""
        member = one.member
        try:
            if not member.is_over("control"):
                self._settle(member, sight)
                return True
            member.spent(*(clock.read() for clock in one.clocks))
            member.finish(now_ms())
        except BaseException as error:  # noqa: BLE001 - the caller raises it
            member.fail(error)
        return False

    def _settle(self, member: Member, sight: Sight) -> None:
        """Give a member the setting that it chooses by its picture, if nobody who is in time is late by that."""
        begun_ms, view = now_ms(), self._outlook(member.asked, member)
        if view.guard is member.asked.guard:  # with more in flight than were measured
            return
        passed_ms = begun_ms - member.accepted_ms + view.ahead_ms
        choice = view.compute(member.request, member.tier, passed_ms, sight)
        with self._changed:
            before = member.plan
            member.settle(choice if self._may_become(member, choice) else None, now_ms() - begun_ms)
            if member.plan is not before:
                self._forecast(member.profile)

    def _may_become(self, member: Member, choice: Choice) -> bool:
        """Whether nobody who is in time is late if a member takes another setting than it was let in with."""
        own, wanted, profile = member.unread(), member.unread(choice), member.profile
        if wanted.reading_ms <= own.reading_ms and wanted.step_ms <= own.step_ms:
            return True
        others = [one.need for one in self._in_flight(but=member)]
        sharing = None if profile is None else profile.sharing(len(others) + 1)
        return sharing is not None and may_become(others, own, wanted, sharing, now_ms())

    @torch.inference_mode()
    def _read(self, reads: Sequence[Read]) -> list[Read]:
        """Read the prompts that can share a pass; start the work and wait for nothing.

        Returns:
            Those whose answers are decoded alone.
        """
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
