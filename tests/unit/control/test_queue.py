"""The door to a device: who is let in, who waits, and how much time is left for whom."""

from __future__ import annotations

import copy
import math
import threading
from typing import Any

import numpy as np
import pytest

from tempovlm.control.price import Envelope, Price, parse_price
from tempovlm.control.queue import (
    DISCIPLINES,
    PATIENCE_MS,
    Discipline,
    Door,
    End,
    Schedule,
    Stay,
    Ticket,
    urgency_ms,
)
from tempovlm.control.shares import even_shares_ms
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


def stay(
    deadline_ms: float, need_ms: float = 10.0, accepted_ms: float = 0.0, owner: str = "", **fields: Any
) -> Stay:
    return Stay(accepted_ms, deadline_ms, need_ms, owner, **fields)


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


USUAL = Envelope.of([0.5, 0.7, 0.8], [10.0, 20.0, 40.0])
"""Slopes of 0.05, 0.02 and 0.005 per ms."""

PRICED = {"usual": USUAL, "gains": USUAL}


def test_even_shares_fill_the_tightest_deadline_first() -> None:
    assert even_shares_ms([100.0]) == pytest.approx([100.0])
    assert even_shares_ms([30.0, 40.0, 300.0]) == pytest.approx([20.0, 20.0, 260.0])
    assert even_shares_ms([300.0, 100.0, 400.0]) == pytest.approx([50.0, 50.0, 300.0]), "in any order of service"
    assert even_shares_ms([math.inf, 100.0, math.inf]) == pytest.approx([50.0, 50.0, math.inf])
    assert even_shares_ms([]) == []


def test_disciplines_say_who_is_first() -> None:
    asked = {"late": (0.0, 300.0, 10.0), "soon": (5.0, 100.0, 10.0), "long": (9.0, 120.0, 90.0)}
    order = {one: sorted(asked, key=lambda name: urgency_ms(one, *asked[name])) for one in DISCIPLINES}
    assert order["edf"] == ["soon", "long", "late"]
    assert order["fcfs"] == ["late", "soon", "long"]
    assert order["slack"] == ["long", "soon", "late"]


@pytest.mark.parametrize("discipline", DISCIPLINES)
def test_door_and_schedule_serve_in_the_same_order(discipline: Discipline) -> None:
    rng = np.random.default_rng(3)
    door, schedule = Door(discipline=discipline), Schedule(discipline=discipline)
    first = stay(1e5)
    assert schedule.admit(first, 0.0)
    stays = [stay(float(at + rng.uniform(500, 5000)), float(rng.uniform(5, 50)), float(at)) for at in range(12)]
    tickets = {}
    for one in stays:
        assert schedule.admit(one, one.accepted_ms)
        tickets[door.line_up(one.accepted_ms, one.deadline_ms, one.need_ms).urgency] = one
    schedule.end(first, 50.0)
    for time_ms, urgency in enumerate(sorted(tickets), 50):
        assert schedule.inside == (tickets[urgency],)
        schedule.end(tickets[urgency], float(time_ms))
    assert copy.deepcopy(door).discipline == discipline


def test_who_is_served_first_pays_most_and_alone_time_is_free() -> None:
    schedule = Schedule()
    inside, soon, late = (stay(deadline, 5.0, **PRICED) for deadline in (200.0, 60.0, 500.0))
    assert schedule.admit(inside, 0.0)
    assert schedule.price_per_ms(0.0, inside) == pytest.approx(0.0), "nobody waits"
    assert schedule.admit(soon, 0.0)
    assert schedule.price_per_ms(0.0, soon) == pytest.approx(0.0), "nobody waits behind it"
    assert schedule.price_per_ms(0.0, inside) == pytest.approx(0.005), "60 for two of them"
    assert schedule.admit(late, 0.0)
    assert schedule.price_per_ms(0.0, late) == pytest.approx(0.0)
    crowd = [stay(61.0, 5.0, **PRICED) for _ in range(3)]
    assert all(schedule.admit(one, 0.0) for one in crowd)
    assert schedule.price_per_ms(0.0, inside) == pytest.approx(0.02), "61 for five of them"
    assert schedule.price_per_ms(0.0, soon) >= schedule.price_per_ms(0.0, late) == pytest.approx(0.0)
    assert schedule.lane_price(0.0, inside).share_ms == pytest.approx(61 / 5)


def test_a_price_of_0_and_unknown_gains_change_nothing() -> None:
    """Random arrivals: who is admitted, and when, is the same with price 0, without gains, and with equal ones."""
    rng = np.random.default_rng(4)
    budgets_ms = rng.uniform(15, 120, 300)
    gaps_ms, took_ms = rng.exponential(8, 300), rng.uniform(8, 14, 300)

    def admitted(price: Price, fields: dict[str, Any]) -> list[int]:
        schedule, time_ms, found = Schedule(price=price), 0.0, list[int]()
        began: dict[Stay, float] = {}
        for i in range(300):
            arrives_ms = time_ms + gaps_ms[i]
            while schedule.inside:
                one = schedule.inside[0]
                begin_ms = began.setdefault(one, time_ms)
                if (end_ms := begin_ms + took_ms[len(began) % 300]) > arrives_ms:
                    break
                time_ms = end_ms
                schedule.end(one, time_ms)
            time_ms = arrives_ms
            if schedule.admit(stay(time_ms + budgets_ms[i], 10.0, time_ms, **fields), time_ms):
                found.append(i)
        return found

    plain = admitted(parse_price("0"), {})
    assert 0 < len(plain) < 300
    assert admitted(parse_price("0"), PRICED) == admitted(Price(), {}) == plain


def test_who_gains_less_than_its_time_is_worth_is_refused_on_arrival() -> None:
    poor = Envelope.of([0.2], [40.0])
    for price, is_admitted in ((Price(), False), (parse_price("0"), True), (parse_price("0.01"), False)):
        schedule = Schedule(price=price)
        assert schedule.admit(stay(61.0, 10.0), 0.0)
        for _ in range(3):
            assert schedule.admit(stay(61.0, 10.0, **PRICED), 0.0)
        assert schedule.admit(stay(62.0, 10.0, usual=USUAL, gains=poor), 0.0) is is_admitted
        weighty = stay(62.0, 10.0, usual=USUAL, gains=poor, weight=100.0)
        assert schedule.admit(weighty, 0.0)
    alone = Schedule()
    assert alone.admit(stay(62.0, 10.0, usual=USUAL, gains=poor), 0.0), "nobody else wants the time"


def test_one_that_waits_is_refused_for_one_that_gains_more() -> None:
    schedule, poor, rich = Schedule(), Envelope.of([0.3], [10.0]), Envelope.of([0.9], [10.0])
    inside = stay(10.0, **PRICED)
    assert schedule.admit(inside, 0.0)
    waiting = [stay(30.0, usual=USUAL, gains=gains) for gains in (USUAL, poor)]
    assert all(schedule.admit(one, 0.0) for one in waiting)
    equal, better = stay(30.0, usual=USUAL, gains=poor), stay(30.0, usual=USUAL, gains=rich)
    assert not schedule.admit(equal, 0.0)
    assert schedule.admit_instead(equal, 0.0) is None, "no more than the one that waits"
    assert not schedule.admit(better, 0.0)
    assert schedule.admit_instead(better, 0.0) is waiting[1]
    assert len(schedule) == 3
    never = Schedule(price=parse_price("0"))
    assert never.admit(stay(10.0, **PRICED), 0.0)
    assert never.admit(stay(20.0, usual=USUAL, gains=poor), 0.0)
    assert never.admit_instead(stay(20.0, usual=USUAL, gains=rich), 0.0) is None


@pytest.mark.parametrize(("waited_ms", "is_displaced"), [(0.0, True), (29.9, True), (30.1, False), (200.0, False)])
def test_who_has_waited_for_more_than_a_tenth_of_its_budget_is_displaced_by_nobody(
    waited_ms: float, is_displaced: bool
) -> None:
    rich = Envelope.of([0.9], [10.0])
    schedule = Schedule(most_waiting=1)
    assert schedule.admit(stay(1000.0, **PRICED), 0.0)
    poor = stay(300.0, usual=USUAL, gains=USUAL)
    assert schedule.admit(poor, 0.0)
    better = stay(waited_ms + 300.0, 10.0, waited_ms, usual=USUAL, gains=rich)
    assert not schedule.admit(better, waited_ms)
    assert (schedule.admit_instead(better, waited_ms) is poor) is is_displaced
    assert len(schedule) == 2


def test_one_that_gains_more_displaces_the_least_of_those_who_just_came() -> None:
    schedule, rich = Schedule(most_waiting=3), Envelope.of([0.9], [10.0])
    assert schedule.admit(stay(5000.0, **PRICED), 0.0)
    worst, poor, usual = (Envelope.of([gain], [10.0]) for gain in (0.2, 0.3, 0.5))
    waiting = [
        stay(at_ms + 300.0, 10.0, at_ms, usual=USUAL, gains=gains)
        for at_ms, gains in ((0.0, worst), (50.0, usual), (50.0, poor))
    ]
    assert all(schedule.admit(one, one.accepted_ms) for one in waiting)
    better = stay(360.0, 10.0, 60.0, usual=USUAL, gains=rich)
    assert not schedule.admit(better, 60.0)
    assert schedule.admit_instead(better, 60.0) is waiting[2]


def test_one_without_a_deadline_is_displaced_by_nobody_after_a_tenth_of_the_patience() -> None:
    one = stay(math.inf, 10.0, 500.0)
    assert one.may_be_refused(500.0 + 0.099 * PATIENCE_MS)
    assert not one.may_be_refused(500.0 + 0.101 * PATIENCE_MS)


def test_an_operators_weight_decides_who_is_refused() -> None:
    schedule = Schedule()
    assert schedule.admit(stay(10.0, **PRICED), 0.0)
    light = stay(20.0, **PRICED)
    assert schedule.admit(light, 0.0)
    assert schedule.admit_instead(stay(20.0, **PRICED), 0.0) is None
    assert schedule.admit_instead(stay(20.0, weight=2.0, **PRICED), 0.0) is light


def test_expected_times_add_up_and_what_they_may_exceed_in_squares() -> None:
    """Behind one that is inside until 10, three of 8 expected and 10 at most end by 34 + sqrt(12), not by 40."""
    for expected_ms, is_admitted in ((None, False), (8.0, True)):
        schedule = Schedule()
        assert all(schedule.admit(stay(37.5, expected_ms=expected_ms), 0.0) for _ in range(3))
        assert schedule.admit(stay(37.5, expected_ms=expected_ms), 0.0) is is_admitted
        assert not schedule.admit(stay(37.4, expected_ms=expected_ms), 0.0)


def test_one_that_has_chosen_is_expected_until_it_ends() -> None:
    schedule, inside = Schedule(), stay(1000.0)
    assert schedule.admit(inside, 0.0)
    schedule.expect(inside, End(36.0, 39.0))
    assert not schedule.admit(stay(48.9), 0.0), "10 at most, and 3 that the one inside may take longer"
    other = Schedule()
    assert other.admit(inside, 0.0)
    other.expect(inside, End(36.0, 39.0))
    assert other.admit(stay(47.1, expected_ms=6.0), 0.0), "42, and 5 that both may take longer"
    waits = stay(49.1)
    assert schedule.admit(waits, 0.0)
    schedule.expect(waits, End(500.0, 500.0))
    schedule.end(inside, 10.0)
    assert schedule.admit(stay(60.0), 10.0), "what was said of one that waits does not count"


def test_the_door_knows_when_those_inside_end() -> None:
    door, me = Door(), threading.get_ident()
    with door.enter(door.line_up(0.0)):
        assert door.ends() == {}
        door.expect(End(40.0, 45.0))
        door.expect(End(30.0, 35.0))
        assert door.ends() == {me: End(30.0, 35.0)}
    assert door.ends() == {}


def test_every_request_is_answered_or_refused_once() -> None:
    """Random arrivals of unequal worth: nobody is lost, answered after a refusal, or refused twice."""
    rng = np.random.default_rng(5)
    schedule, time_ms = Schedule(lanes=2), 0.0
    ended, refused, alive = list[Stay](), list[Stay](), set[Stay]()
    gains = [Envelope.of([worth], [10.0]) for worth in (0.2, 0.5, 0.9)]
    for _ in range(500):
        time_ms += float(rng.exponential(3.0))
        if schedule.inside and rng.random() < 0.4:
            ended.append(schedule.inside[0])
            schedule.end(ended[-1], time_ms)
        one = stay(time_ms + float(rng.uniform(15, 60)), 10.0, time_ms, usual=USUAL, gains=gains[rng.integers(3)])
        alive.add(one)
        if not schedule.admit(one, time_ms):
            refused.append(schedule.admit_instead(one, time_ms) or one)
    while schedule.inside:
        ended.append(schedule.inside[0])
        schedule.end(ended[-1], time_ms)
    assert len(schedule) == 0
    assert len(ended) + len(refused) == len(alive)
    assert {*ended, *refused} == alive
    assert len({*refused}) > 0
