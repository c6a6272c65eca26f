"""Lengths that plans go by."""

from __future__ import annotations

from typing import Any

import pytest

from tempovlm.control.lengths import SEEN, Lengths
from tempovlm.core.request import Request
from tempovlm.latency.profile import MOST_LENGTHS, OutputLength


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
    assert lengths.of(asked(style="long_caption", max_new_tokens=41)).upper == 41, "another cap was never seen"


def test_points_of_many_lengths_are_their_parts_longest() -> None:
    lengths, numbers = OutputLength((1,) * 200).points()
    assert (len(lengths), lengths[-1], sum(numbers)) == (MOST_LENGTHS, 200, 200)
    assert OutputLength((0, 4, 0, 2)).points() == ((2, 4), (4, 2))
