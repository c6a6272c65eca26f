"""Several requests that are asked at once, answered together.

Those with a budget are offered one after the other, the earliest deadline first, and join others as those of other
callers do: if they and all others are expected in time. Each chooses so that those of the batch that come after it
could take the same setting. One that has to wait is offered again when an answer ends, and answered alone when no
other one of the batch is in flight. Those without a budget follow.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING

from tempovlm.control.guard import Guard
from tempovlm.control.joining import Need, ahead_ms
from tempovlm.control.queue import Ticket, check_waiting
from tempovlm.core.request import Answer, Request
from tempovlm.core.units import now_ms
from tempovlm.engine.company.ahead import Opened
from tempovlm.engine.company.member import Asked, Member

if TYPE_CHECKING:
    from tempovlm.engine.company.company import Company
    from tempovlm.engine.engine import Engine


class Batch:
    """Requests that one caller asks at once, each decided about by its guard; all clocks begin together."""

    def __init__(self, company: Company, engine: Engine, requests: Iterable[tuple[Request, Guard]]) -> None:
        accepted_ms = now_ms()
        self._company, self._engine, self._ended = company, engine, threading.Semaphore(0)
        self._asked = [Asked(one, guard, accepted_ms - one.waited_ms) for one, guard in requests]
        hurried = [place for place, one in enumerate(self._asked) if one.request.budget_ms is not None]
        self._hurried = sorted(hurried, key=lambda place: self._asked[place].deadline_ms)
        rest: tuple[Asked, ...] = ()
        for place in reversed(self._hurried):
            self._asked[place] = replace(self._asked[place], rest=rest, ended=self._ended.release)
            rest = (self._asked[place], *rest)

    def answers(self) -> list[Answer]:
        """Answer all; in their order.

        Raises:
            UserError: too many wait, or a request cannot be answered.
        """
        company, count = self._company, len(self._asked)
        if self._hurried:
            check_waiting(self._engine.door.waiting + len(self._hurried) - 1)
            if count == 1 and not self._engine.has_company:
                return [self._engine.answer_alone(self._asked[0])]
        members, found = dict[int, Member](), dict[int, Answer]()
        with ExitStack() as over:
            over.enter_context(company.calling(count))
            for place in self._hurried:
                passed_on = self._pass_on(self._asked[place], members, count - len(found))
                if isinstance(passed_on, Member):
                    members[place] = passed_on
                else:
                    found[place] = passed_on
                    over.enter_context(company.calling_less(1))
            for place in sorted(set(range(count)) - {*self._hurried}):
                members[place] = company.join(self._asked[place])
            for place in [*members]:
                found[place] = members.pop(place).answer()
                if members:  # until the last answer is there the process does not end
                    over.enter_context(company.calling_less(1))
        return [found[place] for place in range(count)]

    def _pass_on(self, asked: Asked, members: Mapping[int, Member], calls: int) -> Member | Answer:
        """Let a request with a budget join as soon as nobody is late by that, or answer it alone.

        While it waits, of the `calls` of this batch only those in flight count.
        """
        company, engine = self._company, self._engine
        opened = None if asked.is_late else Opened.of(engine.runner, asked.request, company.room)
        try:
            while (member := company.offer(asked, opened)) is None:
                in_flight = sum(not one.is_done for one in members.values())
                if not in_flight or not asked.can_begin(now_ms()) or not company.takes(asked):
                    return self._alone(asked, opened)
                with company.calling_less(calls - in_flight):
                    self._ended.acquire()
            return member
        finally:
            if opened is not None:
                opened.close()

    def _alone(self, asked: Asked, opened: Opened | None) -> Answer:
        """Answer a request alone; those behind it are at the door meanwhile, and are left their shares."""
        engine, tickets = self._engine, list[Ticket]()
        try:
            for one in asked.rest:
                tickets.append(engine.line_up(one.request, one.accepted_ms, one.guard))
            return engine.answer_alone(asked, opened)
        finally:
            engine.door.leave(tickets)


def soonest_ms(guards: Sequence[Guard], *, together: bool) -> list[float]:
    """Return the times after which requests would end at the cheapest settings, by their bounds.

    One after the other, or `together` where their pictures and prompts are read before anybody's next step.
    """
    ends_ms = list(accumulate(guard.least_ms() for guard in guards))
    needs = list[Need]()
    for place, guard in enumerate(guards if together else ()):
        profile = guard.profile
        most = 0 if profile is None else max((one.in_flight for one in profile.shared), default=0)
        in_flight = min(place + 1, most)
        among, sharing = guard.among(in_flight), None if profile is None else profile.sharing(in_flight)
        if among is None or sharing is None:
            break
        ends_ms[place] = min(ends_ms[place], ahead_ms(needs, sharing) + among.least_ms())
        needs.append(guard.need(guard.choice_of(None).knobs, 1, ends_ms[place]))
    return ends_ms
