"""The benchmark of a CPU's answers: the card's questions, what a merge counts, and what the card says of it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from preloaded import Preloaded
from tempovlm.api import model_folder

BACKENDS = ("torch:float32", "torch:auto")
SCRIPT = Path("benchmarks/accuracy_cpu.py")
Run = Callable[..., subprocess.CompletedProcess[str]]


def card() -> dict[str, Any]:
    """What the shipped pocket's folder says of it."""
    found: dict[str, Any] = json.loads((model_folder("pocket") / "accuracy.json").read_text())
    return found


@pytest.fixture
def run(repo_root: Path, tmp_path: Path, preloaded: Preloaded) -> Run:
    return partial(preloaded.run, repo_root / SCRIPT, cwd=tmp_path)


def question(right: str, reference: str, fast: str, dataset: str = "okvqa") -> dict[str, Any]:
    texts = {"low": dict(zip(BACKENDS, (reference, fast), strict=True))}
    return {"dataset": dataset, "right": right, "texts": texts | {"high": dict.fromkeys(BACKENDS, right)}}


def shard(folder: Path, number: int, of: int, questions: list[dict[str, Any]], fast: str = "bfloat16") -> Path:
    about = {"weights": card()["weights"], "hardware": "a CPU", "torch": "2", "commit": None}
    stamps = {
        name: about | {"device": f"cpu/{kind}"} for name, kind in zip(BACKENDS, ("float32", fast), strict=True)
    }
    path = folder / f"{number}.json"
    path.write_text(json.dumps({"stamps": stamps, "shard": [number, of], "questions": questions}))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    first = [question("red", "red", "blue"), question("red", "blue", "red"), question("red", "red", "green")]
    return [shard(tmp_path, 0, 2, first), shard(tmp_path, 1, 2, [question("a", "a", "a", "science_qa_img")])]


def test_a_shard_answers_the_questions_of_its_pictures(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "shard.json"
    pictures = card()["recipe"]["batch"] * card()["recipe"]["validation_batches"]
    done = run("--backends", *BACKENDS, "--shard", f"{pictures // 7}/{pictures}", "--json", out)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["shard"] == [pictures // 7, pictures]
    assert {stamp["threads"] for stamp in record["stamps"].values()} == {1}
    assert 1 <= len(record["questions"]) <= 12
    for asked in record["questions"]:
        assert list(asked["texts"]) == ["low", "medium", "high"]
        for texts in asked["texts"].values():
            assert texts["torch:float32"] == texts["torch:auto"]  # both are float32
    assert any(asked["right"] == asked["texts"]["high"]["torch:auto"] for asked in record["questions"])


def test_the_pictures_are_those_of_the_card(monkeypatch: pytest.MonkeyPatch, repo_root: Path) -> None:
    monkeypatch.syspath_prepend(str(repo_root / "benchmarks"))
    from accuracy_cpu import validation_scenes
    from tempovlm.data.registry import GENERATED
    from tempovlm.model.prompt import Tokenizer
    from tempovlm.training.pictures import Pictures

    folder = model_folder("pocket")
    recipe = card()["recipe"]
    batch, seed = recipe["batch"], recipe["validation_seed"]
    small = Pictures(folder / "tokenizer.json", "val", batch, seed, 0, 1)
    drawn = small.make(0, Tokenizer.load(folder / "tokenizer.json"))
    rows = (0, batch // 2)
    for row, (name, scene) in zip(rows, validation_scenes(folder, rows), strict=True):
        assert (scene.image == drawn.images[row].numpy()).all()
        assert name == GENERATED[drawn.datasets[row]]
        assert len(scene.questions) == drawn.segments[row].max()


def test_a_merge_counts_the_answers_that_differ(run: Run, tmp_path: Path, shards: list[Path]) -> None:
    out = tmp_path / "result.json"
    done = run("--merge", *shards, "--json", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["num_questions"] == 4
    rows = {(row["tier"], row["backend"]): row for row in result["rows"]}
    low, reference, both = rows["low", "torch:auto"], rows["low", "torch:float32"], rows["all", "torch:auto"]
    assert [low[name] for name in ("disagreements", "right_to_wrong", "wrong_to_right")] == [3, 2, 1]
    assert (low["accuracy"], low["accuracy_plain"]) == pytest.approx(((1 / 3 + 1) / 2, 2 / 4), abs=1e-5)
    assert reference["disagreements"] == 0
    assert (both["accuracy"], both["disagreements"]) == (pytest.approx((low["accuracy"] + 1) / 2, abs=1e-5), 3)


def test_the_card_has_the_figures(
    repo_root: Path, tmp_path: Path, shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(repo_root / "benchmarks"))
    from accuracy_cpu import merge, update_card
    from tempovlm.training.model_card import write_card

    folder = tmp_path / "pocket"
    shutil.copytree(model_folder("pocket"), folder)
    page, figures = folder / "MODEL_CARD.md", folder / "accuracy.json"
    record = json.loads(figures.read_text())
    record.pop("cpu_bfloat16", None)
    for row in record["settings"]:
        row["num_samples"] = 4
    figures.write_text(json.dumps(record))
    write_card(folder)
    before = page.read_text()
    update_card(folder, merge(shards))
    found = json.loads(figures.read_text())
    assert found.pop("cpu_bfloat16")["hardware"] == "a CPU"
    assert found == record
    after = page.read_text()
    assert "| low | 83.33 | 66.67 | 3 | 2 | 1 |\n" in after
    added = after[after.index("\n## On a CPU in bfloat16") : after.index("\n## Limits")]
    assert after.replace(added, "") == before


def test_wrong_input_is_told_in_a_line(run: Run, tmp_path: Path, shards: list[Path]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    plain = [shard(other, 0, 1, [question("red", "red", "red")], fast="float32")]
    for words, named in (
        (("--shard", "2/2"), "--shard: 2/2: must be I/N"),
        (("--backends", "torch"), "--backends: torch: must be a back end and float32 or auto"),
        (("--merge", shards[0]), "shard 1/2 is there 0 times"),
        (("--merge", *shards, shards[1]), "shard 1/2 is there 2 times"),
        (("--merge", *shards, *plain), f"{plain[0]}: not of the same"),
        (("--merge", *plain, "--card", tmp_path), f"{tmp_path / 'accuracy.json'}"),
        (("--merge", *plain, "--card", model_folder("pocket")), "no answers in float32 and then in bfloat16"),
        (("--merge", *shards, "--card", model_folder("pocket")), "of other weights or questions"),
        (("--card", tmp_path), "only with --merge"),
    ):
        done = run(*words)
        assert done.returncode != 0
        assert named in done.stderr.splitlines()[-1]
