"""`tempovlm model`: what it prints, and the checkpoint it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tempovlm.cli import main as cli
from tempovlm.model.weights import read_config

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(["model", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_info_of_the_full_model(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "info", "molmoe-1b", "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    record = json.loads(out)
    assert record["tensors"] == 3573
    assert record["parameters"]["total"] == pytest.approx(7.22e9, rel=1e-3)
    assert record["memory_bytes"]["cache_per_token_bf16"] == 128 * 1024
    active = {name: setting["active_parameters"] for name, setting in record["settings"].items()}
    assert active["native"] == pytest.approx(1.18e9, rel=1e-2)
    assert active["cheapest"] < active["native"] < active["largest"]
    assert record["settings"]["cheapest"]["total_flops"] < record["settings"]["native"]["total_flops"]
    assert record["files"] is None


def test_the_memory_of_serving_is_that_measured(capsys: pytest.CaptureFixture[str]) -> None:
    for model, name, near in (("molmoe-1b", "molmoe", 0.01), ("pocket", "pocket", 0.07)):
        found = json.loads(run(capsys, "info", model, "--json")[1])["serving_bytes"]
        measured = json.loads((RESULTS / f"memory_{name}_h200.json").read_text())["steps"]
        reserved = sum(found.values()) - found["cuda_context"]
        assert reserved == pytest.approx(1e9 * measured["answers"]["reserved_gb"], rel=0.01)
        assert sum(found.values()) == pytest.approx(1e9 * measured["answers"]["device_gb"], rel=near)
        buffers = 1e9 * (measured["buffers"]["allocated_gb"] - measured["weights"]["allocated_gb"])
        assert found["cache"] == pytest.approx(buffers, rel=0.05)
    out = run(capsys, "info", "molmoe-1b")[1]
    assert "GPU memory  18.3 GB to serve it in bfloat16 (estimate): weights 14.4 GB" in out
    assert "cache 2.28 GB (131 kB a token)" in out
    assert "FLOP, bytes read" in out


def test_info_of_a_folder(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "info", str(tiny_folder))
    assert (code, err) == (0, "")
    for part in ("6 blocks of width 48", "8 experts", "float32", str(tiny_folder), "cheapest", "FLOP"):
        assert part in out
    record = json.loads(run(capsys, "info", str(tiny_folder), "--json")[1])
    assert record["files"]["dtypes"] == ["float32"]
    assert record["files"]["count"] == 1


def test_random_then_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "random"
    words = ("random", "--output_dir", str(out), "--config", "pocket", "--num_layers", "2")
    code, printed, err = run(capsys, *words)
    assert (code, printed) == (0, "")
    assert str(out) in err
    config = read_config(out)
    assert (config.num_blocks, config.vision.num_blocks) == (2, 6)
    assert run(capsys, "info", str(out))[0] == 0
    code, _, err = run(capsys, *words)
    assert code == 2
    assert "not empty" in err


def test_weights_are_drawn_where_the_flag_says_and_the_pockets_tokenizer_has_a_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("tempovlm.model.weights.write_random", lambda *_, **given: seen.update(given))
    words = ("random", "--out", str(tmp_path / "random"), "--config", "molmoe-1b")
    assert run(capsys, *words, "--device", "cpu", "--tokenizer", "pocket")[0] == 0
    assert seen["device"].type == "cpu"
    assert (seen["tokenizer"] / "tokenizer.json").is_file()
    code, _, err = run(capsys, *words, "--device", "abacus")
    assert code == 2
    assert "abacus" in err


def test_a_random_pocket_answers(tmp_path: Path, picture_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "random"
    assert run(capsys, "random", "--out", str(out), "--config", "pocket", "--num_layers", "2")[0] == 0
    asked = ["answer", str(picture_file), "what?", "--model", str(out), "--device", "cpu", "--max_new_tokens", "1"]
    assert cli.main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "random"


def test_a_model_without_a_tokenizer_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempovlm.model.weights.write_random", lambda *_, **__: None)
    code, _, err = run(capsys, "random", "--out", str(tmp_path / "random"), "--config", "molmoe-1b")
    assert code == 0
    assert "without a tokenizer.json it cannot answer: give --tokenizer" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("show",), "unknown command 'model show'; choose one of info, random"),
        (("info", "/nowhere/at/all"), "no such model"),
        (("random", "--output_dir", "x", "--config", "pocket", "--num_layers", "17"), "from 1 to 16"),
        (
            ("random", "--output_dir", "x", "--config", "pocket", "--seed", str(1 << 64)),
            "--seed 18446744073709551616",
        ),
        (("random", "--output_dir", "~nobody-of-that-name/x", "--config", "pocket"), "no such user"),
    ],
)
def test_wrong_words(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert "info" in out
    assert "tempovlm model random" in out
    for command in ("info", "random"):
        with pytest.raises(SystemExit):
            cli.main(["model", command, "--help"])
        assert "examples:" in capsys.readouterr().out
