"""The commands in one process, on the tiny model: what goes to stdout, what to stderr, and every wrong input."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image

import tiny_model
from tempovlm.cli.main import main
from tempovlm.core.request import STAGES
from tempovlm.engine import calibration

KEYS = {
    "time",
    "request_id",
    "answer",
    "knobs",
    "budget_ms",
    "budget_met",
    "budget_feasible",
    "timings_ms",
    "ttft_ms",
    "predicted_ms",
    "finish_reason",
    "policy",
    "margin",
    "tiling",
    "weights_hash",
    "num_vision_tokens",
    "num_text_tokens",
    "num_output_tokens",
    "model",
    "device",
    "backend",
    "schema",
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TEMPOVLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(
        calibration, "measure", lambda engine, *_, **__: tiny_model.make_profile(engine.space).measurements
    )


def run(tiny_folder: Path, *words: object) -> int:
    return main(["answer", *map(str, words), "--model", str(tiny_folder), "--device", "cpu"])


def test_json_is_one_line_and_nothing_else(
    tiny_folder: Path, picture_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_folder, picture_file, "what is the sign?", "--budget_ms", "1e5", "--json") == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    record = json.loads(out)
    assert record.keys() >= KEYS
    assert record["knobs"].keys() == {"tier", "top_k", "num_blocks"}
    assert record["timings_ms"].keys() == {*STAGES, "total"}
    assert record["predicted_ms"].keys() == {"p50", "upper"}
    assert (record["budget_ms"], record["budget_feasible"], record["policy"]) == (
        pytest.approx(1e5),
        True,
        "table (assumed)",
    )
    assert record["budget_met"] is True


def test_people_see_answer_knobs_stages_and_budget(
    tiny_folder: Path, picture_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_folder, picture_file, "what is the sign?", "--budget-ms", "1e5") == 0
    out = capsys.readouterr().out
    for text in ("tier ", "top-k", "blocks", "total", "budget 100000 ms met", *STAGES):
        assert text in out
    assert run(tiny_folder, picture_file, "what is the sign?", "--budget_ms", "0.5") == 0
    out = capsys.readouterr().out
    assert "missed" in out
    assert "even the cheapest of the allowed settings, which ran, was not expected to fit" in out
    given = ("--tier", "low", "--top_k", "4", "--num_blocks", "6")
    assert run(tiny_folder, picture_file, "what is the sign?", "--budget_ms", "0.5", *given) == 0
    assert "this setting was not expected to fit" in capsys.readouterr().out
    assert run(tiny_folder, picture_file, "what is the sign?") == 0
    assert "no budget" in capsys.readouterr().out


def test_knobs_as_flags(tiny_folder: Path, picture_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def knobs(*words: str) -> tuple[dict[str, object], str]:
        assert run(tiny_folder, picture_file, "what?", "--json", *words) == 0
        record = json.loads(capsys.readouterr().out)
        return record["knobs"], record["policy"]

    assert knobs("--tier", "low") == ({"tier": "low", "top_k": 4, "num_blocks": 6}, "fixed")
    assert knobs("--tier", "low", "--top-k", "2", "--num-blocks", "3", "--budget_ms", "50")[1] == "fixed"
    chosen, policy = knobs("--top_k", "3", "--budget_ms", "20")
    assert (chosen["top_k"], policy) == (3, "table (assumed)")
    few = ("--tiers", "low", "medium", "--top_k", "2", "3", "--num_blocks", "4")
    chosen, policy = knobs(*few, "--budget_ms", "1e5")
    assert (chosen, policy) == ({"tier": "medium", "top_k": 3, "num_blocks": 4}, "table (assumed)")
    assert knobs(*few)[0] == {"tier": "medium", "top_k": 3, "num_blocks": 4}, "the nearest to native"
    assert knobs("--budget_ms", "20", "--policy", "fixed") == (
        {"tier": "high", "top_k": 4, "num_blocks": 6},
        "fixed",
    )


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("PICTURE", "what?", "--budget_ms", "0"), "--budget_ms"),
        (("PICTURE", "what?", "--budget_ms", "-5"), "--budget_ms"),
        (("PICTURE", "what?", "--budget_ms", "nan"), "--budget_ms"),
        (("PICTURE", "what?", "--budget_ms", "inf"), "--budget_ms"),
        (("PICTURE", "what?", "--budget_ms", "soon"), "--budget_ms soon: not a number"),
        (("PICTURE", ""), "question is empty"),
        (("PICTURE", "   "), "question is empty"),
        (("PICTURE", "what " * 600), "context"),
        (("PICTURE", "what?", "--tier", "huge"), "--tier huge"),
        (("PICTURE", "what?", "--top_k", "99"), "--top_k 99"),
        (("PICTURE", "what?", "--num_blocks", "5000", "--budget_ms", "50"), "--num_blocks 5000"),
        (("PICTURE", "what?", "--tiers", "low", "huge"), "--tier huge: not in the knob space"),
        (("PICTURE", "what?", "--ranking", "nowhere.json"), "nowhere.json: missing; give a JSON list of blocks"),
        (("PICTURE", "what?", "--ranking", "RANKING"), "ranking.json: block 2 stands at places 2 and 4"),
        (("PICTURE", "what?", "--policy", "nowhere.py:Mine"), "nowhere.py: missing; --policy nowhere.py:Mine"),
        (
            ("PICTURE", "what?", "--policy", "no_module:Mine"),
            "--policy no_module:Mine: no_module cannot be import",
        ),
        (
            ("PICTURE", "what?", "--policy", "json:loads"),
            "--policy json:loads: not a subclass of tempovlm.control.",
        ),
        (("PICTURE", "what?", "--policy", "json:Loads"), "--policy json:Loads: there is no such class"),
        (("PICTURE", "what?", "--policy", "mine.py"), "--policy mine.py: name the class too, as mine.py:CLASS"),
        (("PICTURE", "what?", "--max_new_tokens", "0"), "--max_new_tokens"),
        (("PICTURE", "what?", "--policy", "clever"), "--policy clever: no such policy"),
        (("PICTURE", "what?", "--policy", "PICTURE"), "picture.png: damaged, or no controller checkpoint"),
        (("nowhere.png", "what?"), "nowhere.png: no such file"),
        (("FOLDER", "what?"), "is a directory"),
        (("PICTURE", "what \udcff?"), "the question: 'what \\udcff?' holds bytes that are no UTF-8"),
        (("PICTURE", "what?", "--style", "\udcff"), "the style: '\\udcff' holds bytes that are no UTF-8"),
        (("~nobody-of-that-name/a.png", "what?"), "~nobody-of-that-name/a.png: no such user"),
        (("PICTURE", "what?", "--style", "long_captoin"), "unknown; did you mean long_caption? choose"),
        (("PICTURE", "PICTURE", "PICTURE", "what?"), "takes one picture and one question in quotes; for several"),
        (("PICTURE", "what", "is", "it?"), "unexpected is 'it?'"),
    ],
)
def test_wrong_input_gets_one_line_that_names_it(
    words: tuple[str, ...],
    named: str,
    tiny_folder: Path,
    picture_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ranking = picture_file.parent / "ranking.json"
    ranking.write_text("[0, 2, 1, 2]")
    names = {"PICTURE": str(picture_file), "FOLDER": str(picture_file.parent), "RANKING": str(ranking)}
    assert run(tiny_folder, *(names.get(word, word) for word in words)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert named in captured.err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--model", "no-such-model"), "--model no-such-model"),
        (("--model", "TINY", "--device", "abacus"), "--device abacus"),
        (("--model", "TINY", "--device", "cuda"), "no CUDA device"),
        (("--model", "TINY", "--weights", "fp8"), "--weights fp8: only for decoding on CUDA"),
        (("--model", "EMPTY"), "config.json: missing"),
        (("--model", "~nobody-of-that-name"), "~nobody-of-that-name: no such user"),
    ],
)
def test_wrong_model_or_device(
    flags: tuple[str, ...],
    named: str,
    tiny_folder: Path,
    picture_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "empty").mkdir()
    names = {"TINY": str(tiny_folder), "EMPTY": str(tmp_path / "empty")}
    assert main(["answer", str(picture_file), "what?", *(names.get(word, word) for word in flags)]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert named in captured.err


def test_an_over_large_picture_is_refused_before_it_is_decoded(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "large.png"
    Image.new("1", (10_000, 5_001)).save(path)
    assert run(tiny_folder, path, "what?") == 2
    assert "50 million" in capsys.readouterr().err


def test_a_picture_from_a_pipe_is_read_once(
    tiny_folder: Path, picture_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(path: object) -> str:
        assert run(tiny_folder, path, "what is the sign?", "--json") == 0
        return str(json.loads(capsys.readouterr().out)["answer"])

    ends = os.pipe()
    with os.fdopen(ends[1], "wb") as write:
        write.write(picture_file.read_bytes())  # fits the pipe
    with os.fdopen(ends[0], "rb") as read:
        assert answer(f"/dev/fd/{read.fileno()}") == answer(picture_file)


def test_help_is_spelled_with_underscores(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("answer", "calibrate"):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0
        out = capsys.readouterr().out
        assert "examples:" in out
        assert "-ms" not in out
    with pytest.raises(SystemExit) as ended:
        main(["answer", "a", "b", "--no_such_flag"])
    assert ended.value.code == 2
    assert "no_such_flag" in capsys.readouterr().err


def test_calibrate_measures_what_is_named(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["calibrate", "--model", str(tiny_folder), "--device", "cpu", "--tiers", "low", "high"]
    assert main([*words, "--num_blocks", "4", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert {(row["tier"], row["num_blocks"]) for row in record["settings"]} == {("low", 4), ("high", 4)}
    (tmp_path / "ranking.json").write_text("[4, 3, 2, 1]")
    assert main([*words, "--ranking", str(tmp_path / "ranking.json")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "accuracies are assumed, not measured; those of the model are of its own ranking" in out
    assert "accuracy (assumed)" in out


def test_calibrate(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["calibrate", "--model", str(tiny_folder), "--device", "cpu"]
    assert main([*words, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    record = json.loads(out)
    assert len(record["settings"]) == len(tiny_model.SPACE)
    assert all(0 < row["p50_ms"] <= row["upper_ms"] for row in record["settings"])
    assert record["stamp"]["model"] == tiny_folder.name
    assert main([*words, "--force"]) == 0
    assert "medium" in capsys.readouterr().out


def test_a_request_that_cannot_fit_is_refused(
    tiny_folder: Path, picture_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = (picture_file, "what?", "--policy", "table", "--budget_ms", "0.01", "--on_deadline", "reject")
    assert run(tiny_folder, *asked, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["answer"], found["finish_reason"], found["ttft_ms"]) == ("", "rejected", None)
    assert run(tiny_folder, *asked) == 0
    assert capsys.readouterr().out == "refused: no setting was expected to fit 0.01 ms\n"  # no setting, no stages


def test_people_see_where_an_answer_ended(
    tiny_folder: Path, picture_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = (picture_file, "what?", "--policy", "table", "--budget_ms", "0.01", "--on_deadline", "stop")
    assert run(tiny_folder, *asked) == 0
    assert re.search(r"ended early: deadline, during [a-z_]+\n", capsys.readouterr().out)
    assert run(tiny_folder, picture_file, "what?", "--max_new_tokens", "1") == 0
    assert "cut at its cap on tokens, 1\n" in capsys.readouterr().out
