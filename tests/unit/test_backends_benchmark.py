"""The benchmark of a CPU's back ends: another version's process, decoders of other sizes, tables, wrong input."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from preloaded import Preloaded
from tempovlm.api import model_folder
from tempovlm.core.errors import UserError
from tempovlm.model.weights import read_config


@pytest.fixture(scope="module")
def backends(repo_root: Path) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repo_root / "benchmarks"))
        yield importlib.import_module("backends")


def test_a_decoder_of_another_size_is_timed_here_and_by_another_checkout(
    backends: ModuleType, repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = backends.decoder_folder(model_folder("pocket"), "16x8", tmp_path)
    config = read_config(folder)
    assert (config.num_experts, config.expert_width) == (16, 8)
    monkeypatch.setattr(backends, "ROWS", {"decode_300_k4_b8": "a token"})
    monkeypatch.setattr(backends, "ROW_MS", 0.0)
    monkeypatch.setattr(backends, "BACKENDS", ("torch",))
    before = backends.Before(repo_root, "pocket", 1)
    try:
        assert before("stamp")["model"] == "pocket"
        rows = backends.decoder_rows(folder, 1, before)
    finally:
        before.close()
    assert set(rows) == {"decode_300_k4_b8"}
    for row in rows["decode_300_k4_b8"].values():
        assert row["times"] == 16
        assert 0 < row["p50"] <= row["p99"]
    assert list(rows["decode_300_k4_b8"]) == ["torch", "before"]


def test_the_own_size_is_the_model_itself(backends: ModuleType, tmp_path: Path) -> None:
    folder = model_folder("pocket")
    own = read_config(folder)
    size = f"{own.num_experts}x{own.expert_width}"
    assert backends.decoder_folder(folder, size, tmp_path) == folder


def test_a_checkout_whose_package_fails_is_told(backends: ModuleType, tmp_path: Path) -> None:
    package = tmp_path / "src" / "tempovlm"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    before = backends.Before(tmp_path, "pocket", 1)
    try:
        with pytest.raises(UserError, match=f"--before {tmp_path}: its package failed"):
            before("stamp")
    finally:
        before.close()


def test_tables_have_a_row_for_each_company_and_decoder(backends: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    times = {"p50": 12.34, "p95": 13.0, "p99": 14.0}
    record: dict[str, Any] = {"stamps": {}, "beside_0": {"torch": times, "kernels": times}}
    record["decoders"] = {"32x24": {"prefill_289_k8_b16": {"before": times, "kernels": times}}}
    path.write_text(json.dumps(record))
    answers, decoders = (part.splitlines() for part in backends.table(path).split("\n\n"))
    assert answers == ["| answers, ms | torch | kernels |", "|---|---|---|", "| alone | 12 / 14 | 12 / 14 |"]
    assert decoders[0] == "| decoder, ms | before | kernels |"
    assert decoders[2] == "| 32 × 24: prompt of 289 tokens, k8/b16 | 12.3 | 12.3 |"


def test_wrong_input_is_told_in_a_line(repo_root: Path, tmp_path: Path, preloaded: Preloaded) -> None:
    other = tmp_path / "other.json"
    other.write_text("[]")
    for words, named in (
        (("--before", "/nope"), "--before /nope: no src/tempovlm there; give the folder of a checkout"),
        (("--table", str(other)), f"{other}: no result of backends.py"),
        (("--table", str(tmp_path)), f"{tmp_path}: a folder"),
        (("--decoders", "32by24"), "--decoders: 32by24: must be the number of experts and their width"),
    ):
        done = preloaded.run(repo_root / "benchmarks" / "backends.py", *words, cwd=tmp_path)
        assert done.returncode == 2
        assert named in done.stderr.splitlines()[-1]
