"""The door to a device: who is let in, who waits, and how much time is left for whom."""

from __future__ import annotations

import copy
import math
import threading

import pytest

from tempovlm.control.queue import PATIENCE_MS, Door, Ticket
from tempovlm.core.errors import UserError

SOON_S = 5.0
"""Seconds that nothing here takes unless it hangs."""


def elsewhere(door: Door, ticket: Ticket, order: list[str], name: str) -> threading.Thread:
    """A thread that enters, says so, and leaves."""

    def pass_through() -> None:
        with door.enter(ticket):
            order.append(name)

    ticket.thread = -1 - len(order)
    thread = threading.Thread(target=pass_through, daemon=True)
    thread.start()
    return thread


def test_the_earliest_deadline_is_let_in_first() -> None:
    door, order = Door(), []
    inside = door.line_up(0.0, 50.0)
    with door.enter(inside):
        late, soon = door.line_up(1.0, 900.0), door.line_up(2.0, 80.0)
        patient = door.line_up(3.0)
        threads = [
            elsewhere(door, ticket, order, name)
            for ticket, name in ((patient, "patient"), (late, "late"), (soon, "soon"))
        ]
        assert order == []
        assert door.waiting == 3
    for thread in threads:
        thread.join(SOON_S)
    assert order == ["soon", "late", "patient"]
    assert door.waiting == 0


def test_nobody_waits_for_ever() -> None:
    door = Door()
    patient, hurried = door.line_up(0.0), door.line_up(PATIENCE_MS, PATIENCE_MS + 1.0)
    assert patient.urgency < hurried.urgency


def test_a_thread_that_is_inside_enters_again() -> None:
    door = Door()
    with door.enter(door.line_up(0.0)), door.enter(door.line_up(0.0)):
        assert door.waiting == 0


def test_strangers_are_the_other_threads() -> None:
    door, order = Door(), list[str]()
    assert door.strangers(None) == 0
    with door.enter(door.line_up(0.0)):
        waiting = [elsewhere(door, door.line_up(1.0 + i), order, str(i)) for i in range(2)]
        assert door.strangers(threading.get_ident()) == 1, "both tickets say that they are of one thread"
        assert door.strangers(None) == 2
    for thread in waiting:
        thread.join(SOON_S)
    assert door.strangers(None) == 0


def test_lanes() -> None:
    door, order = Door(lanes=2), []
    with door.enter(door.line_up(0.0)):
        elsewhere(door, door.line_up(0.0), order, "second").join(SOON_S)
        assert order == ["second"]


def test_shares() -> None:
    door = Door()
    assert door.share_ms(0.0) == math.inf
    first, _ = door.line_up(0.0, 300.0), door.line_up(0.0, 330.0)
    assert door.share_ms(0.0) == pytest.approx(110.0), "330 for three: the one inside, and two that wait"
    assert door.share_ms(290.0) == pytest.approx(5.0)
    assert door.share_ms(310.0) == pytest.approx(20 / 3), "a deadline that is over asks for nothing"
    door.leave([first])
    assert door.share_ms(0.0) == pytest.approx(165.0)
    both = Door(lanes=2)
    for _ in range(2):
        both.line_up(0.0, 200.0)
    assert both.share_ms(0.0) == pytest.approx(100.0), "two run side by side"


def test_too_many_are_refused() -> None:
    door = Door(most_waiting=2)
    for _ in range(2):
        door.line_up(0.0)
    with pytest.raises(UserError, match="2 requests wait for this model"):
        door.line_up(0.0)


def test_an_error_inside_opens_the_door() -> None:
    door = Door()
    with pytest.raises(RuntimeError), door.enter(door.line_up(0.0)):
        raise RuntimeError
    with door.enter(door.line_up(0.0)):
        assert door.waiting == 0


def test_a_copy_is_a_door_of_its_own() -> None:
    door = Door(lanes=3)
    door.line_up(0.0)
    assert (copy.deepcopy(door).waiting, copy.deepcopy(door).lanes) == (0, 3)


class Counting(Door):
    """Counts how often threads look whether it is their turn."""

    looks = 0

    def _may_enter(self, ticket: Ticket, thread: int) -> bool:
        self.looks += 1
        return super()._may_enter(ticket, thread)


def test_who_leaves_wakes_only_the_next_one() -> None:
    door, order, count = Counting(), list[str](), 12

    def pass_through(number: int) -> None:
        with door.enter(door.line_up(float(number))):
            order.append(str(number))

    threads = [threading.Thread(target=pass_through, args=(i,), daemon=True) for i in range(count)]
    with door.enter(door.line_up(-1.0)):
        for thread in threads:
            thread.start()
        while door.looks < 1 + count:
            pass
    for thread in threads:
        thread.join(SOON_S)
    assert order == [str(i) for i in range(count)]
    assert door.looks <= 1 + 2 * count
