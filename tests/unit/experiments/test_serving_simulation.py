"""The study's files and flags: its JSON, its page, intervals of blocks, and errors in one line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from queue_worlds import world
from scripts import ROOT, script

from tempovlm.core.errors import UserError
from tempovlm.lab.queueing import learned, page, study
from tempovlm.lab.queueing.arrivals import read_trace
from tempovlm.lab.queueing.choosers import Chooser, of_scores
from tempovlm.lab.queueing.shares import blocks_of, gap_closed, share_row
from tempovlm.lab.queueing.simulate import REFUSED, Outcome
from tempovlm.lab.queueing.study import Study, run_study, write_report
from tempovlm.lab.queueing.world import World
from tempovlm.lab.statistics import percentile_interval

simulate = script("serving/simulate")

FIELDS = {
    *("arrivals", "load", "budget_ms", "policy", "price", "discipline", "requests"),
    *("right_on_time", "on_time", "refused", "late", "refused_late", "interval"),
}

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:05.9799600,110,27
"""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a small world in place of the one on the disk."""
    monkeypatch.setattr(study, "read_world", lambda *_, **__: world(spread=0.1))


def report_of(**changes: object) -> dict[str, object]:
    values = {
        "arrivals": ("poisson",),
        "loads": (1.0,),
        "num_requests": 60,
        "policies": ("native", "greedy", "table", "clairvoyant:table"),
        "prices": ("derived", "0.01"),
    }
    return run_study(Study(**(values | changes)))  # type: ignore[arg-type]


def test_the_file_has_a_row_for_each_simulation(tmp_path: Path) -> None:
    report = report_of(loads=(0.5, 2.0))
    write_report(report, tmp_path / "load.json")
    text = (tmp_path / "load.json").read_text()
    assert "NaN" not in text
    read = json.loads(text)
    assert set(read) == {"schema", "stamp", "conditions", "rows", "kinds", "closed"}
    keys = [(row["load"], row["policy"], row["price"]) for row in read["rows"]]
    policies = [("native", None), ("greedy", None), ("table", "derived"), ("table", "0.01")]
    policies.append(("clairvoyant:table", None))
    assert keys == [(load, *one) for load in (0.5, 2.0) for one in policies]
    for row in read["rows"]:
        assert set(row) == FIELDS
        assert row["on_time"] + row["refused"] + row["late"] == pytest.approx(1.0, abs=1e-4)
        assert row["interval"][0] <= row["right_on_time"] <= row["interval"][1]
        assert row["requests"] == 60
    assert {row["policy"] for row in read["closed"]} == {"native", "table"}


def test_the_same_flags_give_the_same_file(tmp_path: Path) -> None:
    for name in ("one.json", "other.json"):
        write_report(report_of(), tmp_path / name)
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "other.json").read_bytes()


def test_budgets_are_classes_that_add_up(tmp_path: Path) -> None:
    report = report_of(budgets_ms=(60.0, 120.0), policies=("table",), disciplines=("edf", "fcfs"))
    rows = [row for row in report["rows"] if (row["price"], row["discipline"]) == ("derived", "fcfs")]  # type: ignore[attr-defined]
    assert [row["budget_ms"] for row in rows] == [None, pytest.approx(60), pytest.approx(120)]
    whole, *parts = rows
    assert whole["requests"] == sum(row["requests"] for row in parts)
    both = sum(row["requests"] * row["right_on_time"] for row in parts) / whole["requests"]
    assert whole["right_on_time"] == pytest.approx(both)
    kept = page.write(report, tmp_path)[0].read_text()
    assert "<h3>Arrivals: poisson</h3>" in kept
    assert "By budget" in kept
    assert "table, derived price, fcfs" in kept
    assert "http://" not in kept.replace("http://www.w3.org", "")


# Intervals


def correlated(rng: np.random.Generator, count: int = 2000, length: int = 20) -> np.ndarray:
    """Coins of neighbours that are mostly the same, right with 1/2."""
    return np.repeat(rng.random(count // length) < 0.5, length).astype(float)


def test_intervals_of_blocks_cover_the_share_of_correlated_requests() -> None:
    rng, hits = np.random.default_rng(0), 0
    blocks = blocks_of(2000)
    for _ in range(200):
        low, high = percentile_interval(blocks.means(correlated(rng)[:, None])[1:, 0])
        hits += bool(low <= 0.5 <= high)
    assert hits / 200 == pytest.approx(0.93, abs=0.05)


def test_shares_are_those_of_the_chosen_requests() -> None:
    setting = np.array([0, 1, REFUSED, 2] * 5)
    end_ms = np.array([5.0, 15.0, 1.0, 5.0] * 5)
    outcome = Outcome(setting, end_ms, np.array([1.0, 1.0, 0.0, 0.0] * 5), np.full(20, 10.0), np.zeros(20))
    row = share_row(outcome, blocks_of(20))
    assert [row[name] for name in ("right_on_time", "on_time", "refused", "late")] == pytest.approx(
        [0.25, 0.5, 0.25, 0.25]
    )
    first = share_row(outcome, blocks_of(20), np.arange(20) % 4 == 0)
    assert (first["requests"], first["right_on_time"]) == (5, pytest.approx(1.0))


def test_the_gap_is_closed_from_the_greedy_policy_to_the_bound() -> None:
    blocks = blocks_of(100)
    greedy, bound = np.arange(100) % 4 == 0, np.arange(100) % 4 != 1
    half = np.arange(100) % 2 == 0
    closed = gap_closed(half.astype(float), greedy.astype(float), bound.astype(float), blocks)
    assert closed is not None
    assert closed["value"] == pytest.approx(0.5)
    assert gap_closed(half, bound.astype(float), greedy.astype(float), blocks) is None


# Traces and flags


def test_a_trace_is_read_as_milliseconds(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(AZURE)
    assert read_trace(path).tolist() == pytest.approx([0.0, 52.0, 2000.0])


def test_a_window_of_a_trace_is_simulated(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    lines = [f"2023-11-16 18:17:{second:02}.5,1,1" for second in range(30)]
    path.write_text("\n".join(["TIMESTAMP,a,b", *lines]))
    report = report_of(arrivals=(str(path),), first_request=10, num_requests=12, policies=("table",))
    row = report["rows"][0]  # type: ignore[index]
    assert (row["arrivals"], row["requests"]) == ("trace.csv", 12)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a,b\n1,2\n", "no column TIMESTAMP"),
        (AZURE + "yesterday,1,1\n", "line 5: TIMESTAMP 'yesterday' is no time"),
        (AZURE + "2023-11-16 18:17:01.0,1,1\n", "line 5: earlier than the line above"),
        ("TIMESTAMP\n", "0 requests; two are the least"),
        ("TIMESTAMP\n" + "2023-11-16 18:17:03.5\n" * 3, "all of the requests come at once"),
        (AZURE, "which leaves 1 from --first_request 2"),
        ("", "no column TIMESTAMP"),
        (b"PK\x03\x04\xff\xfe", "no CSV file"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_trace_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | bytes | None, fault: str
) -> None:
    path = tmp_path / "trace.csv"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    argv = ["--arrivals", str(path), *(["--first_request", "2"] if "first_request" in fault else [])]
    with pytest.raises(UserError) as error:
        simulate.main(argv)
    assert fault in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "fault"),
    [
        (["--loads", "0"], "--loads 0: must be a positive number"),
        (["--num_requests", "1"], "--num_requests 1: must be at least 2"),
        (["--price", "dear"], "dear"),
        (["--policies", "best"], "--policies best: no such policy"),
        (["--policies", "no/such.pt"], "--policies no/such.pt: no such file"),
        (["--lanes", "2", "--policies", "clairvoyant"], "--lanes 2: the clairvoyant plans for one lane"),
        (["--discipline", "lifo"], "lifo"),
    ],
)
def test_a_wrong_flag_is_one_line(argv: list[str], fault: str) -> None:
    with pytest.raises(UserError) as error:
        simulate.main(["--arrivals", "poisson", *argv])
    assert fault in str(error.value)
    assert "\n" not in str(error.value)


def test_the_script_prints_a_table_and_names_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "load.json"), "--output_dir", str(tmp_path / "page")]
    simulate.main(["--arrivals", "bursts", "--num_requests", "40", "--policies", "table", *files])
    out = capsys.readouterr().out
    assert "table" in out
    pages = [str(tmp_path / "page" / name) for name in ("under_load.html", "bursts.svg")]
    assert out.splitlines()[-3:] == [files[1], *pages]
    assert page.read(tmp_path / "load.json")["rows"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "another/1"}'])
def test_a_file_that_is_no_simulation_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(UserError, match=r"other\.json: is no report of .*simulate\.py"):
        page.read(tmp_path / "other.json")


def test_the_results_that_the_documents_cite_are_files_of_the_study() -> None:
    for name in ("bursts", "poisson", "budgets", "learned", "loads"):
        path = ROOT / "results" / "serving" / f"{name}.json"
        read = json.loads(path.read_text())
        assert read["schema"] == study.SCHEMA
        assert path.stat().st_size < 200_000
        for row in read["rows"]:
            assert set(row) == FIELDS
            assert row["on_time"] + row["refused"] + row["late"] == pytest.approx(1.0, abs=1e-3)


def test_the_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        simulate.main(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "examples:" in out
    assert "--arrivals" in out


def test_a_checkpoint_is_a_policy_and_a_clairvoyant_may_know_what_it_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def scored(names: Sequence[str], of: World, *_: object) -> dict[str, Chooser]:
        asked.extend(names)
        return {name: of_scores(name, of.judged.accuracy, len(of.space)) for name in names}

    monkeypatch.setattr(learned, "learned_choosers", scored)
    report = report_of(policies=("runs/value.pt", "clairvoyant:runs/value.pt"), prices=("derived",))
    assert asked == ["runs/value.pt"]
    assert [row["policy"] for row in report["rows"]] == ["runs/value.pt", "clairvoyant:runs/value.pt"]  # type: ignore[attr-defined]
