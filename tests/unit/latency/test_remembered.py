"""A memory of a bounded number of values."""

from __future__ import annotations

from tempovlm.latency.remembered import remembered


def test_a_value_is_made_once_and_the_oldest_is_forgotten() -> None:
    values: dict[int, list[int]] = {}
    made = [remembered(values, key, lambda key=key: [key], 3) for key in (1, 2, 3, 1, 4, 5)]  # type: ignore[misc]
    assert made[3] is made[0]
    assert values == {3: [3], 4: [4], 5: [5]}
