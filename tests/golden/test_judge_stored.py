"""The judge's report on the repository's results, stored: another choice or another statistic shows.

The baselines that look at a question get made-up features, which need no pictures; all else is as measured.
`PYTHONPATH=tests python tests/golden/test_judge_stored.py` writes it anew, to be read before it is committed.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import stores

from tempovlm.cli import evaluate
from tempovlm.cli.evaluate import Inputs
from tempovlm.control.baselines import LinUCB, NearestNeighbours
from tempovlm.lab.judge.inputs import Content
from tempovlm.lab.judge.offline import Rule, Scored
from tempovlm.lab.table import Table

ROOT = Path(__file__).resolve().parents[2]
STORE = Path(__file__).with_name("judge.json")
BLIND = ("table", "best_static", "only_tier", "only_top_k", "only_num_blocks", "random", "oracle")
BUDGETS_MS = (30.0, 50.0, 75.0, 110.0)
NUM_QUESTIONS = 300
PRICE = 0.3


def flags() -> evaluate.EvaluateArgs:
    results = ROOT / "results"
    return evaluate.EvaluateArgs(
        results_dir=(results / "core_exp_pocket_val",),
        train_results_dir=(results / "core_exp_pocket_train",),
        twin_results_dir=(results / "core_exp_pocket_twin",),
        latency_estimator_path=ROOT / "checkpoints/latency_estimator/best_latency_estimator.pt",
        policies=BLIND,
        subject="table",
        budgets=tuple(map(str, BUDGETS_MS)),
        dataset_names=("okvqa", "text_vqa"),
        draws=40,
    )


class MadeUp:
    """Content without pictures: features that a question's id gives."""

    def features_of(self, table: Table) -> np.ndarray:
        """(N, 6)."""
        seeds = [zlib.crc32(str(name).encode()) for name in table.question_id.tolist()]
        return np.stack([np.random.default_rng(seed).standard_normal(6) for seed in seeds])


def features(table: Table) -> np.ndarray:
    return MadeUp().features_of(table)


def report(inputs: Inputs) -> dict[str, Any]:
    """Everything in judge.json but where it comes from."""
    whole = evaluate.run(inputs)[1]
    return {name: value for name, value in whole.items() if name not in ("stamp", "provenance")}


def scores(inputs: Inputs) -> dict[str, list[list[float]]]:
    """Of the first three judged questions, (3, K), learned on as many training questions as are stored."""
    train, seen = (
        inputs.train.take(np.arange(NUM_QUESTIONS)),
        features(inputs.judged.take(np.arange(3))),
    )
    knn = NearestNeighbours.fit(features(train), train.accuracy, train.image_id.tolist())
    linucb = LinUCB.fit(inputs.space, features(train), train.accuracy, train.upper_ms, seed=0)
    return {"knn": knn.scores(seen).tolist(), "linucb": linucb.scores(seen).tolist()}


def choices(inputs: Inputs) -> dict[str, list[list[int]]]:
    """Settings (B, N) that policies choose for the first judged questions, some of them at a price of time too."""
    table = inputs.judged.take(np.arange(NUM_QUESTIONS))
    content = cast("Content", MadeUp())
    known = replace(inputs.known, content=lambda: content)
    rules: dict[str, Rule] = {name: known.rule(name) for name in ("table", "only_tier", "random", "knn", "linucb")}
    for name, rule in tuple(rules.items()):
        if isinstance(rule, Scored) and name != "random":
            rules[f"{name} at a price of {PRICE}"] = replace(rule, time_price=PRICE)
    return {name: rule(table, BUDGETS_MS).T.tolist() for name, rule in rules.items()}


PARTS = {"report": report, "scores": scores, "choices": choices}


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return Inputs(flags())


@pytest.mark.parametrize("part", PARTS)
def test_it_is_as_stored(part: str, inputs: Inputs) -> None:
    found = list(stores.differences(PARTS[part](inputs), stores.read(STORE)[part], rel=1e-5, least=1e-6))
    assert not found, found[:10]


def test_choices_are_of_many_kinds() -> None:
    stored = stores.read(STORE)["choices"]
    assert len(stored["knn"]) == len(BUDGETS_MS)
    assert len({str(rows) for rows in stored.values()}) >= 8
    assert len(set(stored["knn"][2])) >= 8


if __name__ == "__main__":
    fresh = Inputs(flags())
    stores.write(STORE, {name: part(fresh) for name, part in PARTS.items()})
