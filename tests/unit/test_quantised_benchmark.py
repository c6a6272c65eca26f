"""The benchmark of one-byte weights on the pocket, as short as it gets, and the bytes that a step reads."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from preloaded import Preloaded
from tempovlm.core.cost import plan_cost
from tempovlm.core.knobs import KnobSpace
from tempovlm.core.plan import Plan, Ranking
from tempovlm.model.config import POCKET

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(repo_root: Path, tmp_path: Path, preloaded: Preloaded, few_pictures: Path) -> Run:
    env = {"TEMPOVLM_DATA_DIR": str(few_pictures)}
    return lambda script, *words: preloaded.run(repo_root / "benchmarks" / script, *words, cwd=tmp_path, env=env)


def test_errors_and_accuracy_of_each_kind(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "quantised.json"
    done = run("quantised.py", "--num_samples", "4", "--json", str(out))
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["stamp"]["data_source"] == "synthetic"
    assert (record["num_samples"], record["setting"]) == (4, "high/k8/b16")
    assert [row["weights"] for row in record["rows"]] == ["fp8", "int8"]
    for row in record["rows"]:
        assert 0 < row["relative_logit_error_mean"] <= row["relative_logit_error_max"] < 0.5
        assert row["accuracy_loss"] == pytest.approx(record["accuracy_as_loaded"] - row["accuracy"])
        assert abs(row["accuracy_loss"]) <= row["answers_that_differ"] / 4
        assert row["memory_mb"] == pytest.approx(record["decoder_mb_bf16"] / 2, rel=0.1)


def test_wrong_input_is_told_in_a_line(run: Run) -> None:
    for script, words, named in (
        ("quantised.py", ("--model", "nowhere"), "--model nowhere"),
        ("engine.py", ("--weights", "fp8", "--device", "cpu"), "--weights fp8: only for decoding on CUDA"),
    ):
        done = run(script, *words)
        assert done.returncode != 0
        assert named in done.stderr.splitlines()[-1]


def test_bytes_of_a_step(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repo_root / "benchmarks"))
    from quantised import step_cost

    shape = POCKET.shape
    knobs = KnobSpace.for_model(shape).native
    plan = Plan.build(knobs, Ranking.evenly_spaced(shape.num_blocks), shape)
    context, D, F, E, V = 700, 192, shape.expert_width, shape.num_experts, 1024
    exact = plan_cost(plan, shape, 0, 0, context, 2)
    ours = step_cost(exact, plan, shape, 2, 1)
    products = 4 * D * D + 8 * 3 * D * F
    rows = 4 * D + 8 * (2 * F + D)
    cache = 2 * (context + 1) * D
    assert exact.bytes["decode"] == 2 * (V * D + 16 * (products + D * E + cache))
    assert ours.bytes["decode"] == (V * D + 4 * V) + 16 * (products + 4 * rows + 2 * (D * E + cache))
    assert ours.bytes["prefill"] == exact.bytes["prefill"]
