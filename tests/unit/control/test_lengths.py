"""Lengths that plans go by."""

from __future__ import annotations

from typing import Any

import pytest

import tiny_model
from tempovlm.control.guard import Guard
from tempovlm.control.lengths import SEEN, Lengths
from tempovlm.control.policies import TablePolicy, prior_accuracy
from tempovlm.core.request import Request
from tempovlm.latency.profile import MOST_LENGTHS, OutputLength

PROFILE = tiny_model.make_profile(spread=0.1)


class Ended:
    """The part of an answer that counts."""

    def __init__(self, tokens: int, reason: str = "stop") -> None:
        self.num_output_tokens, self.finish_reason = tokens, reason


def asked(**fields: Any) -> Request:
    return Request(images=(), question="what?", **fields)


def test_the_card_s_lengths_are_cut_at_the_cap() -> None:
    lengths = Lengths({"vqa2": OutputLength((0, 5, 3, 1, 1))})
    assert lengths.of(asked()).counts == (0, 5, 3, 1, 1)
    assert lengths.of(asked(max_new_tokens=3)).counts == (0, 5, 5)
    assert lengths.of(asked(max_new_tokens=1)).counts == (10,)


def test_a_style_that_nobody_measured_may_take_its_cap() -> None:
    length = Lengths({"vqa2": OutputLength((0, 5))}).of(asked(style="long_caption", max_new_tokens=200))
    assert (length.upper, length.mean) == (196, pytest.approx(100.5))


def test_answers_seen_count_once_they_are_many() -> None:
    lengths, request = Lengths({}), asked(style="long_caption", max_new_tokens=40)
    for number in range(SEEN):
        assert lengths.of(request).upper == 40, number
        lengths.observe(request, Ended(9 + number % 3))  # type: ignore[arg-type]
        lengths.observe(request, Ended(1, "deadline"))  # type: ignore[arg-type]
    assert lengths.of(request).upper == 11
    assert lengths.of(asked(style="long_caption", max_new_tokens=45)).upper == 46, "another cap was never seen"


def test_few_caps_are_told_apart() -> None:
    lengths = Lengths({"vqa2": OutputLength((1,) * 4096)})
    for style in ("vqa2", "long_caption"):
        longest = [len(lengths.of(asked(style=style, max_new_tokens=cap)).counts) for cap in range(1, 4097)]
        assert longest[:32] == list(range(1, 33)), "those of short answers"
        assert all(cap <= found <= cap * 17 / 16 for cap, found in enumerate(longest, start=1))
        assert len(set(longest)) < 150, "each has tables of its own"


def test_answers_at_a_cap_count_for_those_that_are_taken_for_the_same() -> None:
    lengths = Lengths({})
    for cap in (33, 34) * (SEEN // 2):
        ended: Any = Ended(cap, "length")
        lengths.observe(asked(style="long_caption", max_new_tokens=cap), ended)
    assert lengths.of(asked(style="long_caption", max_new_tokens=33)).counts[-2:] == (SEEN // 2, SEEN // 2)


def test_points_of_many_lengths_are_their_parts_longest() -> None:
    lengths, numbers = OutputLength((1,) * 200).points()
    assert (len(lengths), lengths[-1], sum(numbers)) == (MOST_LENGTHS, 200, 200)
    assert OutputLength((0, 4, 0, 2)).points() == ((2, 4), (4, 2))


def test_longer_answers_leave_less_room() -> None:
    long = PROFILE.for_lengths(OutputLength((1,) * 200))
    assert long.for_lengths(long.output) is long
    assert PROFILE.for_lengths(OutputLength((1,) * 200)) is long, "tables are made once"
    for index in range(len(tiny_model.SPACE)):
        assert long.upper_total_ms(index) > PROFILE.upper_total_ms(index) + 100 * PROFILE.step_ms(index)


@pytest.mark.usefixtures("ticks")
def test_a_guard_plans_with_the_request_s_length() -> None:
    space = tiny_model.SPACE
    guard = Guard.around(TablePolicy(space, prior_accuracy(space)), space, PROFILE)
    request = asked(budget_ms=1.2 * PROFILE.upper_total_ms(len(space) - 1))
    long = guard.for_lengths(OutputLength((1,) * 60))
    assert long.margin is guard.margin
    assert long.choose_tier(request, None, 0.0).index < guard.choose_tier(request, None, 0.0).index
