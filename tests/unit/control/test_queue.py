"""The door to a device: who is let in, who waits, and how much time is left for whom."""

from __future__ import annotations

import copy
import math
import threading

import pytest

from tempovlm.control.queue import PATIENCE_MS, Door, Schedule, Stay, Ticket
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


def test_who_ends_at_a_deadline_that_is_over_takes_no_share() -> None:
    door = Door()
    door.line_up(0.0, 30.0, runs_over=False)
    door.line_up(0.0, 300.0)
    assert door.share_ms(0.0) == pytest.approx(15.0)
    assert door.share_ms(0.0, least_ms=40.0) == pytest.approx(150.0)
    door.line_up(0.0, 30.0)
    assert door.share_ms(0.0, least_ms=40.0) == pytest.approx(100.0), "one that is answered late takes its time"


def test_room_leaves_each_who_waits_its_least() -> None:
    door = Door()
    assert door.room_ms(0.0) == math.inf
    door.line_up(0.0, 100.0, 30.0)
    assert door.room_ms(0.0) == pytest.approx(70.0)
    door.line_up(0.0, 110.0, 50.0)
    assert door.room_ms(0.0) == pytest.approx(30.0), "30 and 50 before 110"
    door.line_up(0.0, 200.0, 30.0)
    assert door.room_ms(75.0) == pytest.approx(15.0), "the two before are late, and take their time all the same"
    gone = Door()
    gone.line_up(0.0, 20.0, 30.0, runs_over=False)
    gone.line_up(0.0, 100.0, 30.0)
    assert gone.room_ms(0.0) == pytest.approx(70.0), "the first one is over, and ends"
    both = Door(lanes=2)
    both.line_up(0.0, 100.0, 30.0)
    assert both.room_ms(0.0) == both.share_ms(0.0)


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


def stay(deadline_ms: float, need_ms: float = 10.0, accepted_ms: float = 0.0, owner: str = "") -> Stay:
    return Stay(accepted_ms, deadline_ms, need_ms, owner)


def test_who_would_be_late_is_not_admitted() -> None:
    schedule = Schedule()
    first = stay(30.0)
    assert schedule.admit(first, 0.0)
    assert (schedule.running, schedule.waiting) == (1, 0)
    assert not schedule.admit(stay(15.0), 0.0), "10 for the one inside, 10 of its own"
    assert schedule.admit(stay(20.0), 0.0)
    assert not schedule.admit(stay(25.0), 0.0), "its turn ends at 30"
    assert not schedule.admit(stay(19.0, need_ms=1.0), 0.0), "the one that waits would end at 21"
    assert schedule.last_deadline_ms == pytest.approx(30.0)
    assert schedule.admit(stay(math.inf), 0.0)
    assert schedule.last_deadline_ms == math.inf, "it is waited for, however long it takes"
    schedule.end(first, 5.0)
    assert (schedule.running, schedule.waiting) == (1, 1)
    assert schedule.admit(stay(25.0), 5.0), "from 5 to 15, and from 15 to 25, before the one without a deadline"


def test_who_is_late_already_keeps_nobody_out() -> None:
    schedule = Schedule()
    schedule.admit(stay(100.0, need_ms=50.0), 0.0)
    schedule.admit(stay(61.0), 0.0)
    assert schedule.admit(stay(200.0), 80.0), "the second one is cut at its deadline, whoever comes"


def test_how_long_stays_take_is_measured() -> None:
    schedule = Schedule()
    for begin_ms in (0.0, 40.0):
        one = stay(1000.0, accepted_ms=begin_ms)
        schedule.admit(one, begin_ms)
        schedule.end(one, begin_ms + 40.0)
    running = stay(1000.0)
    schedule.admit(running, 80.0)
    assert not schedule.admit(stay(125.0), 80.0), "the one inside is expected to stay until 120"
    assert schedule.admit(stay(135.0), 80.0)
    assert schedule.drain_ms(80.0) == pytest.approx(80.0)
    assert schedule.drain_ms(100.0) == pytest.approx(60.0)
    schedule.end(running, 100.0)
    assert schedule.drain_ms(1000.0) == pytest.approx(0.0)


def test_places_are_bounded_and_shared() -> None:
    schedule = Schedule(most_waiting=3, most_of_owner=2)
    assert schedule.admit(stay(1e6), 0.0)
    assert [schedule.admit(stay(1e6, owner="a"), 0.0) for _ in range(3)] == [True, True, False]
    assert schedule.admit(stay(1e6, owner="b"), 0.0)
    assert schedule.is_full
    assert not schedule.admit(stay(1e6, owner="c"), 0.0)
    assert len(schedule) == 4


def test_lanes_are_taken_side_by_side() -> None:
    schedule = Schedule(lanes=2)
    assert [schedule.admit(stay(20.0), 0.0) for _ in range(5)] == [True] * 4 + [False]


def test_who_waits_far_behind_looks_seldom() -> None:
    door, looks = Door(), dict[str, int]()
    over = threading.Event()

    def wait(name: str, deadline_ms: float) -> None:
        def is_over() -> bool:
            looks[name] = looks.get(name, 0) + 1
            return over.is_set()

        with door.enter(door.line_up(0.0, deadline_ms), is_over):
            pass

    threads = [threading.Thread(target=wait, args=(str(i), 100.0 + i), daemon=True) for i in range(12)]
    with door.enter(door.line_up(-1.0)):
        for thread in threads:
            thread.start()
        while looks.get("0", 0) < 100:
            pass
        over.set()
        for thread in threads:
            thread.join(SOON_S)
    assert looks["11"] < looks["0"] / 2
