"""The parity benchmark's functions on small models: what it calls equal is equal, and what is wrong shows."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_model
from preloaded import Preloaded

CPU = torch.device("cpu")
CONFIG = replace(tiny_model.CONFIG, num_blocks=3)


@pytest.fixture(scope="module")
def runs(repo_root: Path) -> Iterator[Any]:
    """The module that compares two paths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repo_root / "benchmarks"))
        yield importlib.import_module("parity_runs")


def test_float32_against_itself_and_against_bfloat16(runs: Any) -> None:
    model = runs.random_model(CONFIG, CPU, torch.bfloat16)
    exact = runs.in_float32(model)
    for case in runs.CASES:
        same = runs.measure_case(runs.runner(exact), runs.runner(exact), case)
        assert same["max_relative_logit_error"] < 1e-5
        assert same["equal"] == same["clear"] == same["positions"] == runs.STEPS + 1
        row = runs.measure_case(runs.runner(exact), runs.runner(model), case)
        assert 1e-4 < row["relative_norm_error"] < 5e-2
        assert row["clear_and_equal"] == row["clear"]
        assert 1e-4 < row["same_experts"]["max_relative_logit_error"] <= runs.LIMIT
        assert row["tokens"] == same["tokens"] > case.num_words


def test_the_cases_have_the_lengths_and_crops_that_are_promised(runs: Any) -> None:
    from tempovlm.model.config import MOLMOE_1B

    model = runs.empty_model(replace(MOLMOE_1B, num_blocks=0), "meta", torch.float32)
    run = runs.runner(model)
    made = [runs.prepared(run, case) for case in runs.CASES]
    assert [len(ready.prompt.tokens) for ready in made] == [40, 336, 773, 1250]
    assert [0 if ready.crops is None else len(ready.crops.patches) for ready in made] == [0, 1, 7, 13]
    assert all((ready.crops.masks.frac() > 0).any() for ready in made if ready.crops is not None)


def test_kernels_are_forced_token_by_token(runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lane's kernels, in Triton's interpreter, follow tokens that are not their own."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("what the interpreter runs; see tests/gpu")
    from tempovlm.engine.cuda.graphs import GraphDecoder
    from tempovlm.model.kernels.decode import Tile, Tiling

    monkeypatch.setattr(runs, "STEPS", 3)
    tile = Tile(64, 64)
    tiling = Tiling(tile, tile, tile, tile, tile, tile, splits=2, tokens=64)
    model = runs.random_model(replace(CONFIG, num_blocks=1), CPU, torch.bfloat16)
    exact = runs.in_float32(model)
    plain, plan = runs.runner(exact), runs.native_plan(model.config)
    row = runs.measure_case(plain, runs.runner(model, GraphDecoder(model, tiling=tiling)), runs.CASES[1])
    assert row["clear_and_equal"] == row["clear"]
    assert row["relative_norm_error"] < 2e-2
    assert row["by_graphs"] is False
    graphs = GraphDecoder(exact, tiling=tiling)
    ready = runs.prepared(plain, runs.CASES[0])
    forced = torch.arange(runs.STEPS) * 7 % model.config.embedding_size
    expected = runs.logits_along(plain, ready, plan, forced)
    found = runs.compare(runs.logits_along(runs.runner(exact, graphs), ready, plan, forced), expected)
    assert found["max_relative_logit_error"] < 1e-5
    assert not torch.equal(expected.argmax(-1)[:-1], forced)


def test_routes_are_recorded_and_forced_where_a_caller_names_its_limits(runs: Any) -> None:
    """As `MoE.add_to` calls them, with None for no limits."""
    layer, x = runs.random_model(CONFIG, CPU, torch.float32).decoder.block(0).moe, torch.randn(5, CONFIG.width)
    with runs.recorded_experts() as seen:
        weights, experts = layer.route(x, 2, None)
    assert torch.equal(seen[0], experts)
    forced = runs.ForcedExperts(seen)
    again = forced.route(layer, x, 2, None)
    torch.testing.assert_close(again[0], weights)
    assert torch.equal(again[1], experts)
    assert (forced.visits, forced.differing) == (5, 0)


def test_a_wrong_token_at_a_clear_position_is_counted(runs: Any) -> None:
    exact = torch.tensor([[0.0, 4.0, 1.0], [5.0, 4.9, 0.0], [0.0, 1.0, 8.0]])
    ours = exact + torch.tensor([0.0, 0.2, 0.0])
    found = runs.compare(ours, exact)
    assert (found["positions"], found["clear"], found["clear_and_equal"], found["equal"]) == (3, 2, 2, 2)
    assert found["max_relative_logit_error"] == pytest.approx(0.2 / 4.0)
    assert found["within_limit"] == 0
    swapped = runs.compare(exact[:, [1, 0, 2]], exact)
    assert swapped["clear_and_equal"] < swapped["positions"]


def test_the_model_of_another_seed_is_far_away(runs: Any) -> None:
    one, other = (runs.random_model(CONFIG, CPU, torch.float32, seed) for seed in (0, 1))
    row = runs.measure_case(runs.runner(one), runs.runner(other), runs.CASES[0])
    assert row["max_relative_logit_error"] > 0.5


@pytest.mark.skipif(
    "TEMPOVLM_REFERENCE" not in os.environ,
    reason="the published implementation is not here; name a checkout of it in TEMPOVLM_REFERENCE",
)
def test_the_published_implementation_on_the_same_memory(runs: Any) -> None:
    from tempovlm.model.config import MOLMOE_1B

    vision = replace(MOLMOE_1B.vision, width=64, num_blocks=4, num_heads=4, mlp_width=128, feature_layers=(-2, -4))
    config = replace(
        CONFIG,
        expert_width=64,
        embedding_size=256,
        additional_vocab_size=16,
        max_sequence_length=512,
        vision=vision,
    )
    exact = runs.random_model(config, CPU, torch.float32)
    published, remark = importlib.import_module("parity_published").load(os.environ["TEMPOVLM_REFERENCE"], exact)
    assert remark == "compared"
    for case in runs.CASES[:2]:
        row = runs.measure_case(runs.runner(exact), runs.runner(exact), case, published)
        assert row["published_float32"]["fast_against_it"]["max_relative_logit_error"] < 1e-5
        assert 1e-4 < row["published_autocast"]["it_against_exact"]["relative_norm_error"] < 5e-2


def test_golden_numbers_on_a_cpu_and_the_reason_without_a_reference(
    runs: Any, repo_root: Path, tmp_path: Path, preloaded: Preloaded
) -> None:
    out = tmp_path / "parity.json"
    done = preloaded.run(repo_root / "benchmarks" / "parity.py", "--device", "cpu", "--json", out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert 0 < record["max_relative_logit_error"] < 1e-4
    assert record["stamp"]["device"] == "cpu/float32"
    published = importlib.import_module("parity_published")
    exact = runs.random_model(CONFIG, CPU, torch.float32)
    for folder in (None, str(tmp_path)):
        model, remark = published.load(folder, exact)
        assert model is None
        assert remark.startswith("not compared")
        assert "\n" not in remark
