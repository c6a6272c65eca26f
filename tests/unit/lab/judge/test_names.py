"""Names of policies: as people say them, each differently."""

from __future__ import annotations

import pytest

from tempovlm.control.checkpoint import Origin
from tempovlm.lab.judge.names import names


def of(kind: str, **options: object) -> Origin:
    return Origin(kind, options)


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        ("table", "table"),
        ("best_static", "best fixed setting"),
        ("knn", "k nearest neighbours"),
        ("linucb", "LinUCB"),
        ("oracle", "hindsight oracle"),
        ("table:shop", "table tuned on shop"),
        ("table:/data/shop.json", "table tuned on shop"),
        ("my_module:FewBlocks", "FewBlocks"),
    ],
)
def test_policies_without_a_file(policy: str, name: str) -> None:
    assert names([policy], {}) == {policy: name}


def test_checkpoints_are_named_by_what_they_are_not_by_their_path() -> None:
    kinds = {
        "a/b.pt": of("two_stage", policy="two_stage"),
        "a/c.pt": of("two_stage", policy="grpo"),
        "a/d.pt": of("supervised"),
        "a/e.pt": of("llm_based", policy="llm_based"),
        "a/f.pt": of("of another time"),
    }
    found = names(list(kinds), kinds)
    assert list(found.values()) == ["two-stage", "end to end", "supervised", "LLM-based", "of another time"]


def test_the_seed_distinguishes_and_otherwise_the_folder() -> None:
    seeds = {f"runs/{seed}/best.pt": of("two_stage", policy="grpo", seed=seed) for seed in (1, 2)}
    assert list(names(list(seeds), seeds).values()) == ["end to end (seed 1)", "end to end (seed 2)"]
    same = {f"runs/{place}/best.pt": of("supervised", seed=42) for place in ("cpu", "gpu")}
    assert list(names(list(same), same).values()) == ["supervised (cpu)", "supervised (gpu)"]


def test_a_checkpoint_beside_the_baseline_of_the_same_name() -> None:
    path = "saved/knn.pt"
    found = names(["knn", path], {path: of("nearest_neighbours", seed=0)})
    assert found == {"knn": "k nearest neighbours", path: "k nearest neighbours (saved/knn.pt)"}


def test_own_classes_of_one_name_are_told_apart_by_their_files() -> None:
    found = names(["a.py:FewBlocks", "b.py:FewBlocks", "table"], {})
    assert list(found.values()) == ["FewBlocks (a.py:FewBlocks)", "FewBlocks (b.py:FewBlocks)", "table"]


def test_what_distinguishes_two_long_paths_is_cut_at_its_start() -> None:
    paths = [f"{'x' * 60}/{i}/{'y' * 50}{i}/best.pt" for i in range(2)]
    found = list(names(paths, {path: of("supervised") for path in paths}).values())
    assert len(set(found)) == 2
    assert all(len(name) <= len("supervised ()") + 40 and "…" in name for name in found)
