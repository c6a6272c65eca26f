"""Rows of requests that decode together: which graphs serve which plans. Their work is tested in tests/gpu."""

from __future__ import annotations

import numpy as np
import pytest

import tiny_model
from recorders import Again
from tempovlm.core.plan import Plan
from tempovlm.engine.cuda.rows import PACK_BUCKETS, ROW_BUCKETS, ROWS, Rows, cost, fill_pack, row_tokens, union
from tempovlm.engine.engine import Engine
from tempovlm.model.config import MOLMOE_1B, POCKET
from tempovlm.model.vlm import Molmo


@pytest.fixture
def plans(engine: Engine) -> list[Plan]:
    return [engine.plan(one) for one in engine.space]


@pytest.fixture
def rows(engine: Engine) -> Rows:
    model = engine.runner.model
    assert isinstance(model, Molmo)
    return Rows(model, Again())  # type: ignore[arg-type]


def warmed_up(rows: Rows, engine: Engine, plans: list[Plan]) -> list[Plan]:
    """Capture for all plans; return the usual ones."""
    usual = [engine.plan(engine.space.native), engine.plan(engine.space.cheapest)]
    for key in rows.jobs(plans, usual):
        rows.capture(key)
    return usual


def test_a_warm_up_captures_usual_plans_and_what_serves_all_others(
    rows: Rows, engine: Engine, plans: list[Plan]
) -> None:
    usual = warmed_up(rows, engine, plans)
    captured = rows.jobs(plans, usual)
    depths = {len(plan.steps) for plan in plans}
    assert len(captured) == len(set(captured))
    assert len(captured) == 2 * len(PACK_BUCKETS) + (2 + len(depths)) * len(ROW_BUCKETS)
    for plan in plans:
        for size in ROW_BUCKETS:
            found = dict(rows._cover(plan.steps, size))
            assert len(found) == len(plan.steps), "no block more than it needs"
            assert all(found[index] >= top_k for index, top_k in plan.steps)
    for plan in usual:
        assert rows._cover(plan.steps, 2) == plan.steps
    assert rows.jobs(usual, usual) == [key for key in captured if key[1] in {plan.steps for plan in usual}]


def test_the_cheapest_graph_that_covers_is_taken(rows: Rows, engine: Engine, plans: list[Plan]) -> None:
    warmed_up(rows, engine, plans)
    mixed = union([engine.plan(engine.space.cheapest).steps, engine.plan(engine.space.largest).steps])
    assert mixed == engine.plan(engine.space.largest).steps
    few = next(plan for plan in plans if len(plan.steps) == len(mixed) and plan.steps != mixed)
    most = max((plan for plan in plans if len(plan.steps) == 4), key=lambda plan: cost(plan.steps))
    staircase = union([few.steps, most.steps])
    found = rows._cover(staircase, 4)
    needed = dict(staircase)
    assert all(dict(found)[index] >= top_k for index, top_k in needed.items())
    cheaper = [steps for _, steps, size in rows._graphs if size == 4 and cost(steps) < cost(found)]
    assert not any(all(dict(one).get(index, 0) >= needed[index] for index in needed) for one in cheaper)


def test_a_pack_without_a_graph_is_captured_later_and_not_read_at_once_before(
    rows: Rows, engine: Engine, plans: list[Plan]
) -> None:
    usual = warmed_up(rows, engine, plans)
    assert rows.reads_at_once(usual[0], 700)
    other = next(plan for plan in plans if plan.steps not in {one.steps for one in usual})
    assert rows.reads_at_once(other, PACK_BUCKETS[-1] + 1), "the device is busier than the host that feeds it"
    assert not rows.reads_at_once(other, 700)
    rows.settle(lambda: False)
    assert not rows.reads_at_once(other, 700)
    rows.settle(lambda: True)
    assert rows.reads_at_once(other, 700)
    assert not rows.reads_at_once(other, 1000)


def test_nothing_is_captured_while_a_row_is_in_use(rows: Rows, engine: Engine, plans: list[Plan]) -> None:
    rows._plans[1] = plans[0]
    warmed_up(rows, engine, plans)
    assert not rows._graphs
    assert rows.free == [0, *range(2, 8)]


def test_a_row_has_room_for_usual_prompts_of_any_tier_and_their_answers() -> None:
    assert row_tokens(MOLMOE_1B) == 1664
    assert row_tokens(POCKET) == 640
    assert row_tokens(tiny_model.CONFIG) <= tiny_model.CONFIG.max_sequence_length


def test_tokens_of_a_pack_stand_one_after_the_other_in_their_rows() -> None:
    places, bounds = np.full((2, 8), 99), np.full((3, ROWS + 1), 99, np.int32)
    fill_pack(places, bounds, [3, 2], [100, 40])
    assert places.tolist() == [[0, 1, 2, 0, 1, 0, 0, 0], [100, 101, 102, 40, 41, -1, -1, -1]]
    assert bounds[0].tolist() == [0, 3, *[5] * (ROWS - 1)]
    assert bounds[1].tolist() == [100, 40, *[0] * (ROWS - 1)]
    assert bounds[2].tolist() == [3, 2, *[0] * (ROWS - 1)]
