"""The benchmark of the server: arrivals, the client, and shares of all requests."""

from __future__ import annotations

import importlib
import socket
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preloaded import Preloaded, measure_two
from tempovlm.api import load
from tempovlm.data.sample import Sample
from tempovlm.engine import calibration


@pytest.fixture
def serving(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(repo_root / "benchmarks"))
    return importlib.import_module("serving")


def sample_of(answer: str) -> Sample:
    fields: dict[str, Any] = {
        "question_id": "1",
        "image_id": "1",
        "image_path": Path("1.png"),
        "question": "what?",
    }
    return Sample(**fields, answers=(answer,) * 10, style="vqa2", dataset="own", split="val")


def test_arrivals_have_the_rate_that_is_asked(serving: Any, tmp_path: Path) -> None:
    times_ms = serving.arrivals_ms("poisson", 20.0, 4000)
    assert times_ms == sorted(times_ms)
    assert len(times_ms) / times_ms[-1] * 1000 == pytest.approx(20.0, rel=0.1)
    trace = tmp_path / "trace.csv"
    lines = [f"2023-11-16 18:{i // 60:02}:{i % 60:02}.{i:06}0,1,1" for i in range(200)]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(lines) + "\n")
    half_ms = serving.arrivals_ms(str(trace), 5.0, 60)
    assert half_ms[0] == 0
    assert len(half_ms) == 60
    assert len(half_ms) / half_ms[-1] * 1000 == pytest.approx(5.0)
    assert np.diff(half_ms).std() < 10, "even, as the trace"


def test_a_request_counts_once(serving: Any) -> None:
    def reply(status: int, took_ms: float, text: str = "") -> Any:
        body = {"choices": [{"message": {"content": text}}]}
        return serving.Reply(status, {}, body, took_ms, took_ms)

    replies = [
        reply(200, 90, "cat"),
        reply(200, 90, "dog"),
        reply(200, 120, "cat"),
        reply(429, 5),
        reply(429, 50),
        None,
    ]
    found = serving.summary(replies, [sample_of("cat")], 100.0)
    assert found["requests"] == 6
    assert found["right_on_time"] == pytest.approx(1 / 6)
    assert found["on_time_of_admitted"] == pytest.approx(2 / 3)
    assert found["refused"] == pytest.approx(2 / 6)
    assert found["refused_late"] == pytest.approx(1 / 6)
    assert found["failed"] == pytest.approx(1 / 6)


def test_a_cut_answer_is_in_time_but_not_whole(serving: Any) -> None:
    body = {"choices": [{"message": {"content": ""}}], "tempovlm": {"deadline": "cut"}}
    found = serving.summary([serving.Reply(200, {}, body, 90.0, 90.0)] * 2, [sample_of("cat")], [100.0, 80.0])
    assert found["cut_of_admitted"] == pytest.approx(1.0)
    assert found["on_time_of_admitted"] == pytest.approx(0.5), "each by its own budget"


def test_a_server_is_measured_and_the_file_has_what_there_is(
    serving: Any, tiny_folder: Path, picture_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny model behind a server of its own; a GPU's file has the same form."""
    monkeypatch.setenv("TEMPOVLM_CACHE_DIR", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:  # the server finds a calibration, as its second start does
        patch.setattr(calibration, "measure", partial(measure_two, calibration))
        load(str(tiny_folder), device="cpu", warmup=False, progress=False).calibrate()
    one = replace(sample_of("cat"), image_path=picture_file)
    monkeypatch.setattr(serving, "samples_of", lambda count: [one] * count)
    seen: list[set[str]] = []

    def write(found: dict[str, Any], _path: Path | None) -> None:
        seen.append(set(found))
        written.update(found)

    written: dict[str, Any] = {}
    monkeypatch.setattr(serving, "write_json", write)
    flags = [
        "--model",
        str(tiny_folder),
        "--device",
        "cpu",
        "--num_samples",
        "4",
        "--seconds",
        "0.5",
        "--clients",
        "2",
    ]
    flags += ["--parts", "overhead", "refusal", "mixed", "load", "--loads", "1.0", "--servers", "policy"]
    monkeypatch.setattr(
        "sys.argv", ["serving.py", *flags, "--max_tokens", "2", "--json", str(tmp_path / "found.json")]
    )
    serving.main()
    assert seen[0] == {"stamp", "overhead", "refusal"}, "before the others are asked"
    assert set(written) == {"stamp", "overhead", "refusal", "mixed", "load"}
    assert written["refusal"]["refused"] == written["refusal"]["requests"] == 4
    assert 0 < written["overhead"]["p50_ms"] <= written["overhead"]["p99_ms"]
    native, row = written["load"]
    assert set(native) == {"native"}
    assert (row["server"], row["arrivals"]) == ("policy", "poisson")
    assert row["requests"] >= 50
    assert row["failed"] == written["mixed"]["failed"] == 0
    assert written["mixed"]["clients"] == 2
    assert written["stamp"]["device"].startswith("cpu")


def test_servers_of_its_own_are_not_asked_for_beside_a_url(serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["serving.py", "--url", "http://127.0.0.1:1"])
    with pytest.raises(SystemExit) as end:
        serving.read_flags()
    assert end.value.code == 2


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (["--url", "ftp://x"], "--url ftp://x: give the address"),
        (["--server_cores", "-1"], "--server_cores -1: this machine has no such core"),
    ],
)
def test_a_wrong_address_or_core_is_named_before_anything_is_asked(
    serving: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: list[str], fault: str
) -> None:
    monkeypatch.setattr("sys.argv", ["serving.py", "--parts", "refusal", "--servers", "policy", *given])
    with pytest.raises(SystemExit) as end:
        serving.read_flags()
    assert end.value.code == 2
    assert fault in capsys.readouterr().err


def test_a_server_that_is_not_there_is_one_line(
    serving: Any, picture_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "samples_of", lambda _: [replace(sample_of("cat"), image_path=picture_file)])
    monkeypatch.setattr(serving, "stamp_of", lambda *_: {})
    with socket.socket() as taken:  # nobody listens at its port
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr("sys.argv", ["serving.py", "--parts", "refusal", "--servers", "policy", "--url", url])
        with pytest.raises(SystemExit) as end:
            serving.main()
    assert str(end.value.code).startswith(f"error: {url}: no answer")


def test_a_missing_trace_is_named(repo_root: Path, tmp_path: Path, preloaded: Preloaded) -> None:
    script = repo_root / "benchmarks" / "serving.py"
    done = preloaded.run(script, "--trace", "none.csv", cwd=tmp_path)
    assert done.returncode == 2
    assert "--trace none.csv: no such file" in done.stderr
