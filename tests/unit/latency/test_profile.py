from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tiny_model
from tempovlm.cli.calibrate import sharing_text
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobSpace
from tempovlm.latency.profile import (
    SINGLE_PASS_SPREAD,
    Factor,
    LatencyProfile,
    Measurement,
    OutputLength,
    SharedMeasurement,
    load_profile,
    residual_ratios,
    weighted_quantile,
)

SPACE = tiny_model.SPACE
OUTPUT = OutputLength.exactly(4)


def test_medians_and_bounds() -> None:
    profile = tiny_model.make_profile(spread=0.1)
    for i in range(len(SPACE)):
        nominal_ms = tiny_model.nominal_ms(SPACE, i)
        assert profile.p50_total_ms(i) == pytest.approx(nominal_ms)
        assert profile.p50_remainder_ms(i) == pytest.approx(nominal_ms / 2)
        assert profile.p50_prefix_ms(i) == pytest.approx(nominal_ms / 2)
        assert profile.upper_total_ms(i) >= 1.1 * nominal_ms
        assert profile.upper_remainder_ms(i) == pytest.approx(profile.upper_total_ms(i) / 2)


def test_longer_answers_cost_their_steps() -> None:
    short, long = (tiny_model.make_profile(output=OutputLength.exactly(n)) for n in (4, 7))
    for i in (0, len(SPACE) - 1):
        assert long.p50_total_ms(i) - short.p50_total_ms(i) == pytest.approx(3 * 0.5)
        assert long.p50_remainder_ms(i) - short.p50_remainder_ms(i) == pytest.approx(3 * 0.5)
        assert long.upper_total_ms(i) > short.upper_total_ms(i)


def test_answers_of_other_lengths_are_brought_to_the_reference() -> None:
    profile = tiny_model.make_profile()
    step_ms = 0.5
    longer = [
        replace(m, total_ms=m.total_ms + 2 * step_ms, num_output_tokens=m.num_output_tokens + 2)
        for m in profile.measurements
    ]
    mixed = replace(profile, measurements=(*profile.measurements[::2], *longer[1::2]))
    for i in range(len(SPACE)):
        assert mixed.p50_total_ms(i) == pytest.approx(profile.p50_total_ms(i))


def test_how_long_pictures_take_to_open_is_no_part_of_the_spread() -> None:
    profile = tiny_model.make_profile(spread=0.1)
    slow_ms = 6.0
    slow = [
        replace(m, total_ms=m.total_ms + slow_ms, prefix_ms=m.prefix_ms + slow_ms, open_ms=m.open_ms + slow_ms)
        for m in profile.measurements
    ]
    mixed = replace(profile, measurements=(*profile.measurements[::3], *slow[1::3], *profile.measurements[2::3]))
    assert mixed.open_ms == pytest.approx(profile.open_ms)
    for i in range(len(SPACE)):
        assert mixed.p50_prefix_ms(i) == pytest.approx(profile.p50_prefix_ms(i))
        assert mixed.upper_total_ms(i) == pytest.approx(profile.upper_total_ms(i))


def test_more_work_never_takes_less_time() -> None:
    rng = np.random.default_rng(0)
    profile = tiny_model.make_profile()
    noisy = tuple(replace(m, total_ms=m.total_ms * rng.uniform(0.6, 1.6)) for m in profile.measurements)
    tables = replace(profile, measurements=noisy)
    for read in (tables.p50_total_ms, tables.upper_total_ms, tables.upper_remainder_ms):
        shape = (len(SPACE.tiers), len(SPACE.top_ks), len(SPACE.block_counts))
        values = np.array([read(i) for i in range(len(SPACE))]).reshape(shape)
        assert all((np.diff(values, axis=axis) >= 0).all() for axis in range(3))


def test_bounds_cover_new_answers() -> None:
    """Relative noise with a heavy tail, four repeats a setting, as in a calibration."""
    rng = np.random.default_rng(1)
    space = KnobSpace(SPACE.tiers, (4, 6, 8, 10, 12), (8, 10, 12, 14, 16), 8)

    def draw(i: int) -> float:
        return tiny_model.nominal_ms(space, i) * float(rng.lognormal(0, 0.08))

    def measurement(i: int) -> Measurement:
        total_ms = draw(i)
        return Measurement(
            setting=i, total_ms=total_ms, prefix_ms=total_ms / 2, open_ms=1.0, step_ms=(0.5,), num_output_tokens=4
        )

    rows = tuple(measurement(i) for i in range(len(space)) for _ in range(4))
    profile = LatencyProfile("f", space, OUTPUT, rows, None, {})
    fresh = [draw(i) <= profile.upper_total_ms(i) for i in range(len(space)) for _ in range(40)]
    assert np.mean(fresh) >= 0.97
    assert profile.upper_total_ms(0) / profile.p50_total_ms(0) < 1.35


def test_residuals() -> None:
    assert residual_ratios([[1.0], [2.0]]) == [SINGLE_PASS_SPREAD]
    assert residual_ratios([[2.0, 2.0, 2.0]]) == pytest.approx([1.0, 1.0, 1.0])
    assert sorted(residual_ratios([[1.0, 1.0, 1.0, 3.0]])) == pytest.approx([1.0, 1.0, 1.0, 3.0])
    assert residual_ratios([[2.0, 4.0]], [2.0]) == pytest.approx([1.0, 2.0])


def quantile_of_one(values: np.ndarray, weights: np.ndarray, level: float) -> float:
    """The definition, value by value."""
    reached = 0.0
    for value, weight in sorted(zip(values.tolist(), weights.tolist(), strict=True)):
        reached += weight
        if reached >= level * weights.sum() * (1 - 1e-12):
            return float(value)
    raise AssertionError


def test_weighted_quantile() -> None:
    values, weights = np.array([3.0, 1.0, 2.0]), np.array([1.0, 1.0, 2.0])
    for level, expected in ((0.2, 1), (0.5, 2), (0.75, 2), (0.9, 3), (1.0, 3)):
        assert weighted_quantile(values, weights, level) == pytest.approx(expected)
    rng = np.random.default_rng(0)
    rows, weights = rng.lognormal(size=(20, 30)), rng.integers(0, 4, 30).astype(float)
    for level in (0.1, 0.5, 0.97, 1.0):
        each = [quantile_of_one(row, weights, level) for row in rows]
        assert weighted_quantile(rows, weights, level) == pytest.approx(each)


def test_bounds_weigh_lengths_by_how_often_they_occur() -> None:
    rare, common = (tiny_model.make_profile(output=OutputLength((0, 100, 0, n)), spread=0.0) for n in (1, 20))
    step_ms = 0.5
    for i in (0, len(SPACE) - 1):
        two_tokens_ms = tiny_model.nominal_ms(SPACE, i) - 2 * step_ms
        assert rare.upper_total_ms(i) == pytest.approx(two_tokens_ms)
        assert common.upper_total_ms(i) == pytest.approx(two_tokens_ms + 2 * step_ms)
    assert rare.output.mean == pytest.approx(204 / 101)
    assert (rare.output.upper, common.output.upper) == (2, 4)


def test_steps_come_from_settings_with_the_same_blocks_and_experts() -> None:
    profile = tiny_model.make_profile()
    rows = tuple(
        replace(m, step_ms=()) if SPACE.settings[m.setting].tier != "low" else m for m in profile.measurements
    )
    partly = replace(profile, measurements=rows)
    assert all(partly.step_ms(i) == pytest.approx(0.5) for i in range(len(SPACE)))
    cheapest_only = tuple(m if m.setting == 0 else replace(m, step_ms=()) for m in profile.measurements)
    sparse = replace(profile, measurements=cheapest_only)
    assert sparse.step_ms(len(SPACE) - 1) == pytest.approx(0.5 * 6 / 3)


def test_no_length_makes_a_prediction_negative() -> None:
    rng, usual = np.random.default_rng(0), tiny_model.make_profile()
    measurements = [
        replace(m, step_ms=tuple(rng.uniform(0.2, 3.0, 3) * (1 + m.setting % 5))) for m in usual.measurements
    ]
    noisy = replace(usual, measurements=tuple(measurements))
    profile = noisy.for_lengths(OutputLength.exactly(200))
    steps = np.array([profile.step_ms(i) for i in range(len(SPACE))]).reshape(SPACE.shape)
    assert all((np.diff(steps, axis=axis) >= 0).all() for axis in range(steps.ndim))
    for i in range(len(SPACE)):
        shortest_ms = profile.p50_total_ms(i) - 199 * profile.step_ms(i)
        assert shortest_ms == pytest.approx(noisy.for_lengths(OutputLength.exactly(1)).p50_total_ms(i))
        assert shortest_ms >= 0


def test_a_setting_without_measurement_is_refused() -> None:
    profile = tiny_model.make_profile()
    with pytest.raises(UserError, match="measures"):
        replace(profile, measurements=tuple(m for m in profile.measurements if m.setting))


def test_round_trip(tmp_path: Path) -> None:
    profile = tiny_model.make_profile()
    path = tmp_path / "deep" / "profile.json"
    profile.save(path)
    back = load_profile(path, SPACE, "test", OUTPUT)
    assert back is not None
    for i in range(len(SPACE)):
        assert back.upper_total_ms(i) == pytest.approx(profile.upper_total_ms(i), abs=1e-3)
    assert list(path.parent.iterdir()) == [path]
    longer = load_profile(path, SPACE, "test", OutputLength.exactly(9))
    assert longer is not None
    assert longer.p50_total_ms(0) == pytest.approx(profile.p50_total_ms(0) + 5 * 0.5, abs=1e-3)


@pytest.mark.parametrize("damage", ["truncated", "empty", "binary", "list", "changed number", "other version"])
def test_damage_is_reported_and_no_profile(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "profile.json"
    record = tiny_model.make_profile().to_json()
    changed = json.loads(json.dumps(record))
    changed["measurements"][0][1] += 1
    content = {
        "truncated": json.dumps(record)[:-200].encode(),
        "empty": b"",
        "binary": bytes(range(256)),
        "list": b"[1, 2]",
        "changed number": json.dumps(changed).encode(),
        "other version": json.dumps({**record, "schema": "tempovlm.profile/0"}).encode(),
    }
    path.write_bytes(content[damage])
    with caplog.at_level(logging.WARNING, "tempovlm"):
        assert load_profile(path, SPACE, "test", OUTPUT) is None
    (line,) = caplog.messages
    assert str(path) in line
    assert "measuring again" in line
    assert ("of another version" in line) == (damage == "other version")


def test_another_machines_profile_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "profile.json"
    assert load_profile(path, SPACE, "test", OUTPUT) is None
    tiny_model.make_profile().save(path)
    assert load_profile(path, SPACE, "other", OUTPUT) is None
    assert not caplog.messages


def in_flight(setting: int, number: int, first_ms: float, step_ms: float) -> SharedMeasurement:
    return SharedMeasurement(setting=setting, in_flight=number, first_ms=first_ms, step_ms=step_ms)


def test_times_in_company_never_fall_between_those_that_were_measured() -> None:
    factor = Factor(11.5, 5.0, 57.5, 1.2)  # 57.5 and 69 ms
    found = [factor.on(alone_ms) for alone_ms in np.linspace(11.5, 57.5, 40)]
    assert np.all(np.diff(found) > 0)
    assert (found[0], found[-1]) == pytest.approx((57.5, 69.0))


def test_requests_in_flight_together_have_factors_of_the_settings_that_were_measured() -> None:
    profile = tiny_model.make_profile()
    last = len(SPACE) - 1
    first, largest = profile.p50_reading_ms(0), profile.p50_reading_ms(last)
    rows = [
        *(in_flight(0, 2, ratio * first, 0.6) for ratio in (0.9, 1.0, 1.2)),
        *(in_flight(last, 2, ratio * largest, 0.5) for ratio in (0.7, 0.8, 0.8)),
        in_flight(0, 8, 0.5 * first, 1.5),
    ]
    shared = replace(profile, shared=tuple(rows))
    two, eight = shared.sharing(2), shared.sharing(3)
    assert two is not None
    assert eight is not None
    assert (two.most, eight.most) == (2, 8)
    assert two.reading.on(first) == pytest.approx(first)
    assert two.reading.on(largest) == pytest.approx(0.8 * largest)
    assert two.reading.on((first + largest) / 2) == pytest.approx((first + 0.8 * largest) / 2)
    assert two.reading.on(first / 2) == pytest.approx(first / 2), "no factor but those measured"
    assert two.reading.on(2 * largest) == pytest.approx(2 * 0.8 * largest)
    assert two.step.on(0.5) == pytest.approx(0.6), "of equal times the dearer one counts"
    assert two.spread == pytest.approx(1.2)
    assert (eight.reading.on(10.0), eight.step.on(10.0), eight.spread) == pytest.approx((5.0, 30.0, 1.0))
    assert shared.sharing(1) == two
    assert shared.sharing(99) == eight
    assert profile.sharing(2) is None
    slower = shared.in_company(eight)
    assert slower.step_ms(last) == pytest.approx(3 * profile.step_ms(last))
    assert slower.p50_reading_ms(last) == pytest.approx(0.5 * largest)
    assert slower.open_ms == pytest.approx(profile.open_ms)
    assert slower.p50_picture_ms(last) == pytest.approx(0.5 * profile.p50_picture_ms(last))
    assert shared.in_company(eight) is slower
    half = shared.part(SPACE.subset({"tier": [SPACE.tiers[-1]]}))
    assert {one.setting for one in half.shared} == {len(half.space) - 1}
    told = (
        "2 requests: reading 1.00 to 0.80 each, a token 1.00 to 1.20, 8 requests: reading 0.50 each, a token 3.00"
    )
    assert sharing_text(shared) == told
    other = slower.for_lengths(OutputLength.exactly(2))
    assert other.p50_total_ms(last) == pytest.approx(slower.p50_total_ms(last) - 2 * 3 * profile.step_ms(last))
    ratio = (slower.p50_total_ms(last) - 1.0) / (profile.p50_total_ms(last) - 1.0)
    assert slower.upper_total_ms(last) == pytest.approx(1.0 + ratio * (profile.upper_total_ms(last) - 1.0))


def test_they_are_stored_and_a_profile_without_them_looks_as_ever(tmp_path: Path) -> None:
    profile = tiny_model.make_profile()
    assert not any("shared" in name for name in profile.to_json())
    assert LatencyProfile.from_json(profile.to_json(), SPACE).shared == ()
    shared = replace(profile, shared=(in_flight(1, 4, 12.5, 0.75), in_flight(1, 16, 10.25, 1.5)))
    shared.save(tmp_path / "profile.json")
    found = load_profile(tmp_path / "profile.json", SPACE, "test", shared.output)
    assert found is not None
    assert found.shared == shared.shared
