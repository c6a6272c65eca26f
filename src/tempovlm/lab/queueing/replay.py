"""Replays the requests of a study against a running server: real pictures, a real clock, no waiting for answers.

Requests are those of the simulator, arrival by arrival: the same questions, budgets and times between arrivals.
Each is sent when it is due, whoever has been answered, and is answered as the simulator takes it (`on_deadline`
is `reject`): refused before it takes lane time if nothing fits or is worth its time any more, and otherwise
answered to its end. The client judges by its own clock: an answer is on time if its last byte
came within the budget from sending. The policy `native` has no deadlines: it is asked without a budget, and
judged by it all the same. A connection that fails, or a reply that is neither an answer nor a refusal, counts as
late.

Shapes: `n` requests.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tempovlm.control.price import DERIVED
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KNOBS, KnobConfig
from tempovlm.core.progress import Advance, progress_bar, silent
from tempovlm.core.units import s_from_ms
from tempovlm.data.sample import Sample
from tempovlm.data.scoring import score
from tempovlm.lab.judge.inputs import Content
from tempovlm.lab.live.asking import BUDGET_HEADER, PATH, Call, body_of, one_by_one, open_loop
from tempovlm.lab.live.client import Client, Reply
from tempovlm.lab.live.server import check_cores, client_of, serving, stamp_of
from tempovlm.lab.queueing.agreement import Agreement, read_simulated
from tempovlm.lab.queueing.choosers import NATIVE, SHEDS, TABLE
from tempovlm.lab.queueing.journal import Journal, Replayed
from tempovlm.lab.queueing.simulate import REFUSED, Outcome
from tempovlm.lab.queueing.study import (
    WAITING,
    Inputs,
    Key,
    Plan,
    Study,
    add_rows,
    conditions_of,
    is_path,
    key_of,
    read_inputs,
    write_report,
)
from tempovlm.lab.queueing.world import Traffic
from tempovlm.lab.script import flag
from tempovlm.lab.table import Floats

SCHEMA = "tempovlm.replay/1"

MOST_WAITING = 240
"""Requests that wait at a server that is started: as many as it takes."""

SERVABLE = (NATIVE, SHEDS, TABLE)
"""Policies with a name that a server can have."""

_WARM, _TIMED = 8, 24
"""Answers at the native setting before a row, which count for nothing, and those that say how fast a server is."""

_OK, _REFUSALS = 200, (429, 503)


@dataclass(frozen=True, kw_only=True)
class Replay(Study):
    """The flags of a replay."""

    policies: Sequence[str] = flag((NATIVE, TABLE), f"{', '.join(SERVABLE)}, or paths of checkpoints")
    prices: Sequence[str] = flag((DERIVED,), "of lane time: derived, 0, or accuracy per ms", "--price")
    url: str | None = flag(
        None,
        "address of a running server, such as http://127.0.0.1:8000; default: each row starts one and ends it",
    )
    server_cores: Sequence[int] = flag(
        (),
        "cores of the servers that are started; give the client others by taskset; default: those of the client",
    )
    max_tokens: int | None = flag(None, "most tokens of an answer; default: the server's own")
    simulated: Path | None = flag(
        None, "figures that simulate.py wrote, to compare with; default: the same requests are simulated"
    )
    output_dir: Path | None = None

    def check(self) -> None:
        """Raise a `UserError` that names the first flag whose value makes no sense."""
        super().check()
        if wrong := [name for name in self.policies if name not in SERVABLE and not is_path(name)]:
            raise UserError(
                f"--policies {wrong[0]}: no server has it; choose from {', '.join(SERVABLE)}, or give the path of "
                "a checkpoint"
            )
        if WAITING in self.prices:
            raise UserError(f"--price {WAITING}: no server has it; choose derived, 0, or accuracy per ms")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"--max_tokens {self.max_tokens}: must be at least 1")
        check_cores(self.server_cores)
        if self.url is not None:
            client_of(self.url)


def run_replay(flags: Replay) -> dict[str, Any]:
    """Replay everything; returns the report, which is also written to `--json`.

    Each finished row is kept in a file beside `--json` until then, and one that is there is not asked for again.

    Raises:
        UserError: a flag makes no sense, a file cannot be read or written, or a server does not answer.
    """
    inputs = read_inputs(flags)
    _check_one_server(flags, inputs.plans)
    simulated = None if flags.simulated is None else read_simulated(flags.simulated, inputs)
    report = inputs.report(SCHEMA, _stamp(flags)) | {"url": flags.url}
    journal = Journal(flags.json, _sameness(flags, inputs, report["stamp"]))
    samples = _samples(inputs, flags.data_dir)
    agreement = Agreement(inputs, simulated)
    paces, lags_ms, failed = dict[Key, float | None](), list[Floats](), 0
    with progress_bar(_title(inputs, journal)) as advance:
        if journal.native_ms is None:
            journal.start(_native_ms(flags, list(samples.values())))
        for name, load in inputs.cells:
            traffic, found = inputs.traffic(name, load), dict[Key, Replayed]()
            for plan in inputs.plans:
                key = key_of(name, load, plan)
                if key not in journal:
                    told = partial(_tell, advance, sum(map(len, lags_ms)), inputs.num_requests)
                    journal.keep(key, _replay_row(flags, inputs, plan, traffic, samples, told))
                found[key] = journal.find(key, traffic.budget_ms)
                lags_ms.append(found[key].outcome.arrival_ms - traffic.arrival_ms)
                failed += int(np.isinf(found[key].outcome.end_ms).sum())
            outcomes = {key: one.outcome for key, one in found.items()}
            paces |= {key: one.pace for key, one in found.items()}
            add_rows(report, inputs, traffic, outcomes)
            agreement.add(traffic, outcomes, paces)
    about = {"live_native_ms": journal.native_ms, "sent_late_p99_ms": _p99(lags_ms), "failed": failed}
    report["conditions"] |= about
    report |= agreement.found(report["rows"], paces)
    if flags.json is not None:
        write_report(report, flags.json)
    journal.close()
    return report


def _p99(lags_ms: Sequence[Floats]) -> float:
    return float(np.quantile(np.concatenate(lags_ms), 0.99))


def _sameness(flags: Replay, inputs: Inputs, stamp: Mapping[str, Any]) -> dict[str, Any]:
    """Return what all rows of one replay have in common, as JSON has it."""
    named = ("arrivals", "loads", "policies", "prices", "disciplines", "model_path", "device", "url", "max_tokens")
    given: dict[str, Any] = {name: getattr(flags, name) for name in named}
    given |= {name: stamp.get(name) for name in ("hardware", "weights")} | conditions_of(inputs)
    given["gaps"] = [float((gaps**2).sum()) for gaps in inputs.gaps.values()]
    return json.loads(json.dumps(given))


def _replay_row(
    flags: Replay, inputs: Inputs, plan: Plan, traffic: Traffic, samples: Mapping[int, Sample], advance: Advance
) -> Replayed:
    """Ask for one row."""
    fields = {"on_deadline": "reject"} | ({} if flags.max_tokens is None else {"max_tokens": flags.max_tokens})
    bodies = {row: body_of(samples[row], None, **fields) for row in set(traffic.question.tolist())}
    with _client(flags, inputs, plan) as client:
        calls = asyncio.run(_ask_all(client, plan, traffic, bodies, advance))
    return Replayed(judged(inputs, traffic, calls, samples), pace(inputs, calls))


def _title(inputs: Inputs, journal: Journal) -> str:
    """Say what is asked for, and what is there already."""
    left = [(cell, plan) for cell in inputs.cells for plan in inputs.plans if key_of(*cell, plan) not in journal]
    minutes = sum(s_from_ms(float(inputs.traffic(*cell).arrival_ms[-1])) for cell, _ in left) / 60
    asked = (
        f"Replaying {sum(len(inputs.gaps[cell[0]]) for cell, _ in left)} requests: at least {minutes:.1f} minutes"
    )
    return asked + (f"; {len(journal)} rows are in {journal.path} already" if len(journal) else "")


def _tell(advance: Advance, before: int, total: int, done: int, _: int) -> None:
    advance(before + done, total)


def _check_one_server(flags: Replay, plans: Sequence[Plan]) -> None:
    """Raise a `UserError` if one running server is to have several policies, prices or disciplines."""
    guarded = [plan for plan in plans if plan[0].is_guarded]
    if flags.url is not None and len(guarded) > 1:
        names = " and ".join(" ".join(filter(None, (chooser.name, *rest))) for chooser, *rest in guarded[:2])
        raise UserError(f"--url: one server cannot be {names}; ask for one of them, or leave --url out")


def _samples(inputs: Inputs, data_dir: Path | None) -> dict[int, Sample]:
    """Return the asked questions with their pictures, by row."""
    asked = {row for cell in inputs.cells for row in inputs.traffic(*cell).question.tolist()}
    content = Content.read([inputs.world.judged], data_dir)
    return {row: content.of(inputs.world.judged, row) for row in sorted(asked)}


def _stamp(flags: Replay) -> dict[str, Any]:
    return stamp_of(flags.model_path, flags.device, flags.server_cores)


def server_flags(inputs: Inputs, plan: Plan) -> list[str]:
    """Return the flags with which `tempovlm serve` does as a plan says."""
    chooser, price, discipline = plan
    given = {"--device": inputs.study.device, "--max_queue": str(MOST_WAITING)}
    if chooser.name in (NATIVE, SHEDS):
        flags = ("--tiers", *(f"--{knob}" for knob in KNOBS[1:]))
        given |= dict(zip(flags, map(str, inputs.world.space.native.values), strict=True))
    else:
        given |= {"--policy": chooser.name}
    given |= {"--price": price or "0"} | ({} if discipline is None else {"--discipline": discipline})
    return [word for pair in given.items() for word in pair]


@contextmanager
def _client(flags: Replay, inputs: Inputs, plan: Plan) -> Iterator[Client]:
    """Return a client of the server of a plan, which runs while the block runs."""
    if flags.url is None:
        with serving(flags.model_path, *server_flags(inputs, plan), cores=flags.server_cores) as server:
            yield server.client()
    else:
        yield client_of(flags.url)


def _native_ms(flags: Replay, samples: Sequence[Sample]) -> float:
    """Return the mean time of an answer at the native setting, alone, over HTTP."""
    bodies = [body_of(sample, None) for sample in samples[:_TIMED]]

    async def ask(client: Client) -> float:
        await _warm(client, bodies)
        return float(np.mean([reply.took_ms for reply in await one_by_one(client, bodies)]))

    if flags.url is not None:
        return asyncio.run(ask(client_of(flags.url)))
    with serving(flags.model_path, "--device", flags.device, cores=flags.server_cores) as server:
        return asyncio.run(ask(server.client()))


async def _warm(client: Client, bodies: Sequence[bytes]) -> None:
    """Ask some questions that count for nothing.

    Raises:
        UserError: the server cannot be reached, or does not answer.
    """
    where = f"http://{client.host}:{client.port}"
    try:
        replies = await one_by_one(client, bodies[:_WARM])
    except OSError as error:
        raise UserError(f"{where}: no answer ({error.strerror or error}); start a server there") from None
    for reply in replies:
        if reply.status != _OK:
            said = reply.body.get("error", {}).get("message", "no reason given")
            raise UserError(f"{where}: status {reply.status} for a question without a budget: {said}")


async def _ask_all(
    client: Client, plan: Plan, traffic: Traffic, bodies: Mapping[int, bytes], advance: Advance = silent
) -> list[Call]:
    """Send all requests when they are due."""
    await _warm(client, list(bodies.values()))
    rows, budgets_ms = traffic.question.tolist(), traffic.budget_ms.tolist()

    async def ask(number: int) -> Reply:
        headers = {BUDGET_HEADER: f"{budgets_ms[number]:.3f}"} if plan[0].is_guarded else None
        return await client.post(PATH, bodies[rows[number]], headers)

    try:
        return await open_loop(ask, traffic.arrival_ms.tolist(), advance)
    finally:
        client.close()


def _is_told(reply: Reply | None) -> bool:
    """Whether there was an answer, or a refusal."""
    return reply is not None and reply.status in (_OK, *_REFUSALS)


def pace(inputs: Inputs, calls: Sequence[Call]) -> float | None:
    """Return the median of what answers took inside the server over the results' median of their settings.

    A difference to the simulator may be one of the machine's speed: 1 says that it was that of the results. None
    without any answer.
    """
    ratios = []
    for reply in (call.reply for call in calls):
        if reply is not None and reply.status == _OK:
            told = reply.body["tempovlm"]
            usual_ms = inputs.world.usual_ms[_setting_of(inputs, reply)]
            ratios.append((told["timings_ms"]["total"] - told["timings_ms"]["queue"]) / usual_ms)
    return float(np.median(ratios)) if ratios else None


def _setting_of(inputs: Inputs, reply: Reply) -> int:
    return inputs.world.space.index(KnobConfig.from_mapping(reply.body["tempovlm"]["knobs"]))


def _score(inputs: Inputs, sample: Sample, reply: Reply, row: int, setting: int) -> float:
    """Return an answer's score; where accuracies are assumed, that of its setting."""
    if inputs.study.assumed_accuracy:
        return float(inputs.world.judged.accuracy[row, setting])
    return score(sample, reply.body["choices"][0]["message"]["content"] or "")


def judged(inputs: Inputs, traffic: Traffic, calls: Sequence[Call], samples: Mapping[int, Sample]) -> Outcome:
    """Return how the requests ended by the client's clock.

    Args:
        inputs: of the study.
        traffic: the requests.
        calls: (n,) what became of them.
        samples: the questions by row.
    """
    count = len(calls)
    setting, scores = np.full(count, REFUSED, dtype=np.int64), np.zeros(count)
    sent_ms = np.array([call.sent_ms for call in calls])
    end_ms = sent_ms.copy()
    for i, (call, row) in enumerate(zip(calls, traffic.question.tolist(), strict=True)):
        reply = call.reply
        if reply is None or not _is_told(reply):
            setting[i], end_ms[i] = inputs.world.native, math.inf
            continue
        end_ms[i] += reply.took_ms
        if reply.status == _OK:
            setting[i] = _setting_of(inputs, reply)
            scores[i] = _score(inputs, samples[row], reply, row, setting[i])
    return Outcome(setting, end_ms, scores, sent_ms + traffic.budget_ms, sent_ms)
