"""The replay against servers of the test: whom it asks what, how it counts, and what it compares with."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decision_worlds import COST_MS, SPACE
from queue_worlds import world
from scripts import script

from tempovlm.core.errors import UserError
from tempovlm.data.sample import Sample
from tempovlm.lab.judge.inputs import Content
from tempovlm.lab.live.client import Reply
from tempovlm.lab.queueing import replay, study
from tempovlm.lab.queueing.replay import Replay, run_replay
from tempovlm.lab.queueing.study import Study, run_study, write_report

replay_script = script("serving/replay")

FIELDS = {
    *("arrivals", "load", "budget_ms", "policy", "price", "discipline", "requests"),
    *("right_on_time", "on_time", "refused", "late", "refused_late", "interval"),
}
FAST = 100.0
"""A load at which no test waits."""


@dataclass
class FakeServer:
    """Answers question i by `i % 4`: right in time, wrong in time, refused, right but late.

    Attributes:
        flags: of each server that was started. asked: question and budget header of each request.
        broken: the fate of questions that are answered otherwise, by number.
    """

    flags: list[Sequence[str]] = field(default_factory=list)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    broken: dict[int, Reply | None] = field(default_factory=dict)
    cores: tuple[int, ...] = ()
    most_tokens: int | None = None
    host: str = "127.0.0.1"
    port: int = 1

    @contextmanager
    def serving(self, _model: str, *flags: str, cores: Sequence[int] = ()) -> Iterator[FakeServer]:
        self.cores = tuple(cores)
        self.flags.append(flags)
        yield self

    def client(self) -> FakeServer:
        return self

    def close(self) -> None:
        """Nothing is open."""

    async def post(self, _path: str, body: bytes, headers: dict[str, str] | None = None) -> Reply:
        asked = json.loads(body)
        question = asked["messages"][0]["content"][0]["text"]
        budget = (headers or {}).get("x-tempovlm-budget-ms")
        number = int(question.removeprefix("what is ").removesuffix("?"))
        if asked.get("on_deadline") == "reject":
            self.most_tokens = asked.get("max_tokens")
            self.asked.append((question, budget))
        if budget is None:
            return answer("right", 1.0)
        if number in self.broken:
            found = self.broken[number]
            if found is None:
                raise ConnectionResetError
            return found
        ends = (answer("right", 1.0), answer("wrong", 1.0), Reply(429, {}, {}, 1.0, 1.0), answer("right", 1e5))
        return ends[number % 4]


def answer(text: str, took_ms: float) -> Reply:
    times_ms = {"total": 1000.0 + 2 * COST_MS[SPACE.index(SPACE.native)], "queue": 1000.0}
    told = {"knobs": SPACE.native.as_dict(), "timings_ms": times_ms}
    body = {"choices": [{"message": {"content": text}}], "tempovlm": told}
    return Reply(200, {}, body, took_ms, took_ms)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeServer:
    """Ask a small world's questions of a fake server."""
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"picture")

    def sample_of(name: str) -> Sample:
        fields: dict[str, Any] = {"question_id": name, "image_id": name, "image_path": picture}
        fields |= {"question": f"what is {int(name[1:])}?", "answers": ("right",) * 10, "style": "vqa2"}
        return Sample(**fields, dataset="okvqa", split="val")

    def read(tables: Any, _data_dir: Path | None) -> Content:
        return Content({key: sample_of(key[1]) for key in tables[0].questions})

    monkeypatch.setattr(study, "read_world", lambda *_, **__: world(spread=0.1))
    monkeypatch.setattr(replay, "_stamp", lambda _: {"hardware": "of the test"})
    monkeypatch.setattr(Content, "read", read)
    fake = FakeServer()
    monkeypatch.setattr(replay, "serving", fake.serving)
    monkeypatch.setattr(replay, "client_of", lambda _: fake)
    return fake


def flags_of(**changes: Any) -> dict[str, Any]:
    values = {"arrivals": ("poisson",), "loads": (FAST,), "num_requests": 60, "policies": ("table",)}
    return values | changes


def replayed(**changes: Any) -> dict[str, Any]:
    return run_replay(Replay(**flags_of(**changes)))


# Asking and counting


@pytest.mark.usefixtures("server")
def test_each_request_counts_once_as_the_client_sees_it() -> None:
    report = replayed(policies=("native", "table"))
    native, table = report["rows"]
    for row in (native, table):
        assert set(row) == FIELDS
        assert row["requests"] == 60
    # 60 requests ask each of the 60 questions once.
    shares = [table[name] for name in ("right_on_time", "on_time", "refused", "late")]
    assert shares == pytest.approx([0.25, 0.5, 0.25, 0.25])
    assert table["interval"][0] <= 0.25 <= table["interval"][1]
    assert (native["right_on_time"], native["refused"]) == pytest.approx((1.0, 0.0))
    assert report["conditions"]["failed"] == 0
    assert report["stamp"] == {"hardware": "of the test"}
    # Answers take twice as long inside as the world says, without what they waited; its times spread by a tenth.
    assert [row["pace"] for row in report["differences"]] == pytest.approx([2.0, 2.0], rel=0.2)
    # Simulated at the server's slower pace fewer are in time.
    native_row, _ = report["differences"]
    assert native_row["at_pace"] > native_row["right_on_time"]


def test_only_policies_that_know_deadlines_are_told_of_budgets(server: FakeServer) -> None:
    replayed(policies=("native",), budgets_ms=(60.0, 90.0))
    assert {budget for _, budget in server.asked} == {None}
    server.asked.clear()
    replayed(policies=("table",), budgets_ms=(60.0, 90.0))
    assert {budget for _, budget in server.asked} - {None} == {"60.000", "90.000"}
    assert sum(budget is not None for _, budget in server.asked) == 60


def test_requests_are_those_of_the_simulator(server: FakeServer) -> None:
    report = replayed(policies=("table",))
    asked = [question for question, budget in server.asked if budget is not None]
    inputs = study.read_inputs(Study(**flags_of()))
    rows = inputs.traffic("poisson", FAST).question
    assert asked == [f"what is {row}?" for row in rows]
    assert report["conditions"]["native_ms"] == pytest.approx(inputs.world.native_ms)


def test_no_answer_and_no_refusal_is_late(server: FakeServer) -> None:
    server.broken = {0: None, 4: Reply(500, {}, {}, 1.0, 1.0), 2: Reply(503, {}, {}, 1.0, 1.0)}
    server.broken[6] = Reply(429, {}, {}, 50.0, 50.0)
    report = replayed()
    row = report["rows"][0]
    shares = [row[name] for name in ("right_on_time", "refused", "late")]
    assert shares == pytest.approx([13 / 60, 14 / 60, 18 / 60])
    assert row["refused_late"] == pytest.approx(1 / 60), "told when half of its budget had passed"
    assert report["conditions"]["failed"] == 2


def test_each_row_has_a_server_of_its_own(server: FakeServer) -> None:
    replayed(policies=("native", "native_sheds", "table"), prices=("derived", "0.01"), disciplines=("slack",))
    _, native, sheds, derived, constant = (" ".join(flags) for flags in server.flags)
    for flags in (native, sheds):
        assert "--tiers high --top_k 8 --num_blocks 16" in flags
        assert "--price 0" in flags
    assert "--discipline" not in native
    assert "--policy table --price derived --discipline slack" in derived
    assert "--policy table --price 0.01 --discipline slack" in constant


def test_a_server_that_does_not_answer_is_named(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def post(*_: Any) -> Reply:
        return Reply(401, {}, {"error": {"message": "no key"}}, 1.0, 1.0)

    monkeypatch.setattr(server, "post", post)
    with pytest.raises(
        UserError, match=r"http://127\.0\.0\.1:1: status 401 for a question without a budget: no key"
    ):
        replayed(url="http://127.0.0.1:1")

    async def gone(*_: Any) -> Reply:
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(server, "post", gone)
    with pytest.raises(UserError, match=r"no answer \(Connection refused\)"):
        replayed(url="http://127.0.0.1:1")


def test_a_request_is_sent_before_the_one_ahead_is_answered() -> None:
    """The server answers when all have come: a client that waited for answers would never end."""
    inputs = study.Inputs(
        study=Study(**flags_of()), world=world(), budgets_ms=[72.0], gaps={}, prices={}, plans=[]
    )
    traffic = study.draw_traffic(inputs.world, np.ones(3), FAST, [72.0], 0)

    class Waiting(FakeServer):
        def __init__(self) -> None:
            super().__init__()
            self.came, self.everybody = 0, asyncio.Event()

        async def post(self, _path: str, _body: bytes, headers: dict[str, str] | None = None) -> Reply:
            if headers is not None:
                self.came += 1
                if self.came == 3:
                    self.everybody.set()
                await self.everybody.wait()
            return answer("right", 1.0)

    async def run() -> list[Any]:
        plan = (study.choosers.named("table", inputs.world), "0", None)
        bodies = dict.fromkeys(traffic.question.tolist(), b"{}")
        asked = replay._ask_all(Waiting(), plan, traffic, bodies)  # type: ignore[arg-type]
        return await asyncio.wait_for(asked, 10)

    assert len(asyncio.run(run())) == 3


# Going on after a kill


TWO: dict[str, Any] = {"policies": ("native", "table"), "loads": (FAST, 2 * FAST)}


def killed(server: FakeServer, monkeypatch: pytest.MonkeyPatch, path: Path, after: int) -> None:
    """Let a replay be killed by its server's start, after as many rows."""
    begun = 0

    @contextmanager
    def serving(model: str, *flags: str, **options: Any) -> Iterator[FakeServer]:
        nonlocal begun
        begun += 1
        if begun > 1 + after:  # the first one says how fast native answers are
            raise KeyboardInterrupt
        with server.serving(model, *flags, **options) as one:
            yield one

    with monkeypatch.context() as patched:
        patched.setattr(replay, "serving", serving)
        with pytest.raises(KeyboardInterrupt):
            replayed(**TWO, json=path)


def test_a_kill_keeps_the_rows_that_were_finished_and_the_same_flags_go_on(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.broken = {0: None, 4: Reply(429, {}, {}, 50.0, 50.0)}
    path, journal = tmp_path / "replay.json", tmp_path / "replay.unfinished.json"
    killed(server, monkeypatch, path, 3)
    assert not path.exists()
    kept = json.loads(journal.read_text())["rows"]
    named = [(row["load"], row["policy"]) for row in kept]
    assert named == [(FAST, "native"), (FAST, "table"), (2 * FAST, "native")]
    server.flags.clear()
    capsys.readouterr()
    report = replayed(**TWO, json=path)
    assert len(server.flags) == 1, "one row was left, and how fast the server is was known"
    assert f"3 rows are in {journal} already" in capsys.readouterr().err.replace("\n", "")
    assert not journal.exists()
    assert len(json.loads(path.read_text())["rows"]) == 4
    whole = replayed(**TWO, json=tmp_path / "other.json")
    for one, other in zip(report["rows"], whole["rows"], strict=True):
        for name in ("right_on_time", "on_time", "refused", "late", "refused_late"):
            assert one[name] == pytest.approx(other[name])
    # Question 0 fails only in rows of the table: where nobody tells a budget the fake server answers.
    assert report["conditions"]["failed"] == whole["conditions"]["failed"] == 2
    assert [row["pace"] for row in report["differences"]] == pytest.approx(
        [row["pace"] for row in whole["differences"]], abs=1e-3
    )


def test_a_row_of_a_load_with_many_digits_is_found_again(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TWO, "loads", (FAST + 1 / 3,))
    killed(server, monkeypatch, tmp_path / "replay.json", 1)
    server.flags.clear()
    replayed(**TWO, json=tmp_path / "replay.json")
    assert len(server.flags) == 1, "the other row was there"


def test_a_journal_that_cannot_be_written_is_told_before_a_row(server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        replayed(**TWO, json=tmp_path / "file" / "replay.json")
    assert len(server.flags) == 1, "the one that says how fast native answers are"


def test_a_row_with_lists_of_different_lengths_is_damaged(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(server, monkeypatch, tmp_path / "replay.json", 1)
    journal = tmp_path / "replay.unfinished.json"
    record = json.loads(journal.read_text())
    record["rows"][0]["score"].pop()
    journal.write_text(json.dumps(record))
    with pytest.raises(UserError, match="damaged"):
        replayed(**TWO, json=tmp_path / "replay.json")


def test_finished_figures_stay_until_new_ones_are_whole(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "replay.json"
    replayed(**TWO, json=path)
    before = path.read_bytes()
    killed(server, monkeypatch, path, 1)
    assert path.read_bytes() == before


@pytest.mark.parametrize("changes", [{"seed": 1}, {"loads": (3.0,)}, {"num_requests": 50}, None])
def test_rows_of_other_flags_are_not_mixed(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any] | None
) -> None:
    path, journal = tmp_path / "replay.json", tmp_path / "replay.unfinished.json"
    killed(server, monkeypatch, path, 1)
    if changes is None:
        journal.write_text("{}")
    before = journal.read_text()
    server.asked.clear()
    fault = "damaged" if changes is None else f"another .*{next(iter(changes))}"
    with pytest.raises(UserError, match=fault) as error:
        replayed(**TWO | (changes or {}), json=path)
    assert str(journal) in str(error.value)
    assert "\n" not in str(error.value)
    assert journal.read_text() == before
    assert not server.asked


def test_servers_and_answers_are_as_the_flags_say(server: FakeServer) -> None:
    replayed()
    assert (server.cores, server.most_tokens) == ((), None)
    replayed(server_cores=(0,), max_tokens=4)
    assert (server.cores, server.most_tokens) == ((0,), 4)


@pytest.mark.usefixtures("server")
def test_where_accuracies_are_assumed_an_answer_counts_as_much_as_its_setting() -> None:
    """Texts are those of random weights; three of four questions are answered, two of them in time."""
    report = replayed(assumed_accuracy=True)
    native = world(spread=0.1).judged.accuracy[:, SPACE.index(SPACE.native)]
    in_time = [row for row in range(60) if row % 4 < 2]
    assert report["rows"][0]["right_on_time"] == pytest.approx(native[in_time].sum() / 60)
    assert report["conditions"]["assumed_accuracy"] is True


# Comparing


@pytest.mark.usefixtures("server")
def test_differences_to_a_file_are_in_points(tmp_path: Path) -> None:
    flags = flags_of(policies=("native", "table"), budgets_ms=(60.0, 90.0))
    write_report(run_study(Study(**flags)), tmp_path / "load.json")
    simulated = json.loads((tmp_path / "load.json").read_text())["rows"]
    report = replayed(**flags, simulated=tmp_path / "load.json")
    assert len(report["differences"]) == len(report["rows"]) == 6
    for live, other, found in zip(report["rows"], simulated, report["differences"], strict=True):
        assert (found["policy"], found["requests"]) == (live["policy"], live["requests"])
        for name in ("right_on_time", "on_time", "refused", "late"):
            assert found[name] == pytest.approx(100 * (live[name] - other[name]))
        assert found["interval"][0] <= found["right_on_time"] <= found["interval"][1]
    # Simulated natives are late at this load, the fake server's are not.
    assert report["orders"] == [
        {
            "arrivals": "poisson",
            "load": FAST,
            "live": ["native", "table derived edf"],
            "simulated": ["table derived edf", "native"],
            "same": False,
        }
    ]


@pytest.mark.usefixtures("server")
def test_without_a_file_the_same_requests_are_simulated(tmp_path: Path) -> None:
    flags = flags_of(policies=("native", "table"))
    write_report(run_study(Study(**flags)), tmp_path / "load.json")
    one, other = replayed(**flags), replayed(**flags, simulated=tmp_path / "load.json")
    for own, read in zip(one["differences"], other["differences"], strict=True):
        assert own["right_on_time"] == pytest.approx(read["right_on_time"], abs=0.02)
        assert own["interval"][0] <= own["right_on_time"] <= own["interval"][1]
    assert one["orders"] == other["orders"]
    assert [set(row) for row in one["simulated"]] == [FIELDS, FIELDS]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"seed": 1}, "seed 1 there and 0 here"),
        ({"num_requests": 50}, "requests of poisson 50 there and 60 here"),
        ({"arrivals": ("bursts",)}, "requests of poisson None there and 60 here"),
        ({"loads": (1.0,)}, "no row of poisson 100.0 table derived edf"),
        ({"budgets_ms": (50.0,)}, r"budgets_ms \[50.0\] there"),
        (None, "no figures of simulate.py"),
    ],
)
def test_figures_of_other_requests_are_refused_before_any_is_asked(
    server: FakeServer, tmp_path: Path, changes: dict[str, Any] | None, fault: str
) -> None:
    path = tmp_path / "load.json"
    if changes is None:
        path.write_text("{}")
    else:
        write_report(run_study(Study(**flags_of(**changes))), path)
    with pytest.raises(UserError, match=fault) as error:
        replayed(simulated=path)
    assert "\n" not in str(error.value)
    assert not server.asked


# Flags


@pytest.mark.parametrize(
    ("argv", "fault"),
    [
        (["--policies", "greedy"], "--policies greedy: no server has it"),
        (["--policies", "clairvoyant:table"], "--policies clairvoyant:table: no server has it"),
        (["--price", "waiting"], "--price waiting: no server has it"),
        (["--price", "derived", "0", "--url", "http://a:1"], "one server cannot be table derived edf and table 0"),
        (["--simulated", "none.json"], "--simulated none.json: cannot be read"),
        (["--loads", "0"], "--loads 0: must be a positive number"),
        (["--server_cores", "0", "-1"], "--server_cores -1: this machine has no such core"),
    ],
)
def test_a_wrong_flag_is_one_line(server: FakeServer, argv: list[str], fault: str) -> None:
    with pytest.raises(UserError) as error:
        replay_script.main(["--arrivals", "poisson", *argv])
    assert fault in str(error.value)
    assert "\n" not in str(error.value)
    assert not server.asked


@pytest.mark.usefixtures("server")
def test_the_script_prints_tables_and_writes_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "replay.json"
    argv = ["--arrivals", "poisson", "--loads", str(FAST), "--num_requests", "60", "--json", str(path)]
    replay_script.main(argv)
    out = capsys.readouterr().out
    assert "server - simulator, points" in out
    assert "same order at 0 of 1 loads" in out
    assert "the results are not of this server's speed" in out  # which answers in a millisecond
    assert out.splitlines()[-1] == str(path)
    text = path.read_text()
    assert "NaN" not in text
    read = json.loads(text)
    assert {"schema", "stamp", "conditions", "rows", "differences", "orders", "simulated"} <= set(read)


def test_the_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        replay_script.main(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "--simulated" in out
    assert "run_core_experiment.py" in out
    assert "--output_dir runs/times" in out
