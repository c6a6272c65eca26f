"""Members whose answers are decoded together, a row each; while the host reads a step, the next one runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tempovlm.core.units import now_ms
from tempovlm.engine.company.member import Member
from tempovlm.engine.cuda.rows import Arriving, Rows, arriving
from tempovlm.latency.clock import StageClock


@dataclass(eq=False, slots=True)
class Seat:
    """A member with a row.

    Attributes:
        clocks: of the stages that it shared, until they are read.
        started: tokens that are made or under way. last_ms: when the last one was read.
    """

    member: Member
    row: int
    clocks: tuple[StageClock, ...]
    started: int = 1
    last_ms: float = 0.0
    is_over: bool = False

    @property
    def goes_on(self) -> bool:
        """Whether another step may make a token for it."""
        return not self.is_over and self.started < self.member.request.max_new_tokens

    def start(self) -> None:
        """A step has started that makes a token for it."""
        self.started += 1

    def add(self, token: int, at_ms: float) -> None:
        """Add a token that was read at `at_ms`; after the last one the member's caller wakes."""
        member = self.member
        try:
            is_last = member.add(token)
            if member.transcript.tokens[1:]:
                member.stepped(at_ms - self.last_ms)
            else:
                member.spent(*(clock.read() for clock in self.clocks))
        except BaseException as error:  # noqa: BLE001 - the caller raises it
            self.is_over = True
            member.fail(error)
            return
        self.last_ms = at_ms
        if is_last:
            self.is_over = True
            member.finish(at_ms)


@dataclass(frozen=True, slots=True)
class UnderWay:
    """Tokens on their way to the host, and whose they are, by their place; of a step, or of prompts."""

    tokens: Arriving
    seats: dict[int, Seat]
    is_step: bool = False


class Seats:
    """The rows of an engine, and who has them."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self._seats: list[Seat] = []
        self._under_way: deque[UnderWay] = deque()

    @property
    def members(self) -> list[Member]:
        """Those who have a row."""
        return [seat.member for seat in self._seats]

    def fits(self, member: Member) -> bool:
        """Whether a member can have a row: greedy, and short enough."""
        request = member.request
        return request.temperature == 0 and self.rows.fits(len(member), request.max_new_tokens)

    def join(self, seats: Sequence[Seat], first: Tensor, limit: Tensor | None) -> None:
        """Begin the answers of equal plans whose prompts are in their rows, with the `first` tokens (B,)."""
        lengths = [len(seat.member) for seat in seats]
        self.rows.join([seat.row for seat in seats], seats[0].member.plan, lengths, first, limit)
        self._seats += seats
        self._under_way.append(UnderWay(arriving(first), dict(enumerate(seats))))

    @property
    def may_start(self) -> bool:
        """Whether somebody needs a step, and no two are under way: the host reads one while the next one runs."""
        return sum(one.is_step for one in self._under_way) < 2 and any(seat.goes_on for seat in self._seats)

    def start(self) -> None:
        """Start a step of all who need one."""
        going = {seat.row: seat for seat in self._seats if seat.goes_on}
        made = self.rows.advance()
        for seat in going.values():
            seat.start()
        self._under_way.append(UnderWay(made, going, is_step=True))

    @property
    def last(self) -> UnderWay | None:
        """The tokens that were the last to start; None if none are on their way."""
        return self._under_way[-1] if self._under_way else None

    def awaits(self, tokens: UnderWay | None) -> bool:
        """Whether some tokens are on their way still."""
        return any(one is tokens for one in self._under_way)

    def collect(self) -> bool:
        """Read the tokens that are there already; whether there were any."""
        before = len(self._under_way)
        while self._under_way and self._under_way[0].tokens.are_there:
            self._read()
        return len(self._under_way) < before

    def wait(self) -> None:
        """Wait for the next tokens, and read them."""
        if self._under_way:
            self._read()

    def _read(self) -> None:
        made = self._under_way.popleft()
        tokens, at_ms = made.tokens.read(), now_ms()
        for place, seat in made.seats.items():
            if not seat.is_over:
                seat.add(tokens[place], at_ms)
                if seat.is_over:
                    self._seats.remove(seat)
                    self.rows.leave(seat.row)

    def clear(self) -> list[Member]:
        """Give all rows up; return the members."""
        members = self.members
        for seat in self._seats:
            self.rows.leave(seat.row)
        self._seats.clear()
        self._under_way.clear()
        return members
