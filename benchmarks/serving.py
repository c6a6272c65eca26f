r"""Measures `tempovlm serve` by requests over HTTP: what it adds, who is on time under load, refusals and memory.

Starts the server as a process of its own, or asks one that runs (`--url`), with questions of the generated data
sets and their pictures.

- `overhead`: one client on a kept connection; the client's time less the engine's own time of the same answer;
- `refusal`: budgets that no setting fits; from the last byte of the body to the reply;
- `mixed`: clients that ask on and on, with budgets drawn between `--mixed_ms`; one that is refused asks again when
  the budget would have been over;
- `load`: arrivals that wait for nobody (Poisson, and with `--trace` a file's, scaled) at shares of the closed-loop
  rate at the native setting; each request has `--budget` times the native median. By the model's own policy, by
  the table, and by a server whose only setting is the native one, which sheds what it could not answer in time;
- `memory`: pictures of 12 megapixels that wait, above an idle server and their bodies.

Right and on time are shares of all requests; admitted are those that were not refused, however late the refusal
came (`refused_late`), and one that was cut counts as on time if it came by its deadline. Of random weights only
times count. Times are the client's; it runs on the same machine, on other cores where it is told so. The file is
written after each part.

    python benchmarks/serving.py --json benchmarks/results/serving_cpu.json
    python benchmarks/serving.py --parts load --trace AzureLLMInferenceTrace_code.csv --loads 0.5 1.0
    tempovlm model random --config molmoe-1b --device cuda --tokenizer pocket --output_dir /tmp/molmoe-1b-random
    taskset --cpu-list 4-7 python benchmarks/serving.py --model /tmp/molmoe-1b-random --server_cores 0 1 2 3 \
        --clients 8 --mixed_ms 20 60 --callers 8 --loads 1.0 2.0 --max_tokens 4 --servers policy
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from deadlines import samples_of
from output import write_json
from tempovlm.core.errors import UserError
from tempovlm.core.progress import progress_bar
from tempovlm.core.units import now_ms
from tempovlm.data.sample import Sample
from tempovlm.data.scoring import score
from tempovlm.lab.live.asking import BUDGET_HEADER, PATH, body_of, closed_loop, one_by_one, open_loop
from tempovlm.lab.live.client import Client, Reply
from tempovlm.lab.live.server import check_cores, client_of, serving, stamp_of
from tempovlm.lab.queueing.arrivals import POISSON, gaps_of, is_drawn, read_trace

PARTS = ("overhead", "refusal", "mixed", "load", "memory")
WARM, ALONE, CLOSED_S = 30, 100, 10.0
REFUSALS, WAITING = 200, 100
NATIVE = ("--tiers", "high", "--top_k", "8", "--num_blocks", "16")
POLICY, TABLE, SHEDS = "policy", "table", "native_sheds"
AT_ONCE = 0.1
"""Share of the budget within which a refusal must be told."""

MIXED = (1.0, 3.0)
"""Budgets of the mixed clients, times the native median, where none are given."""


def arrivals_ms(name: str, rate: float, count: int) -> list[float]:
    """Return the times of `count` arrivals at a mean rate a second: drawn, or of a trace's second half."""
    first = 0 if is_drawn(name) else len(read_trace(Path(name))) // 2
    return (gaps_of(name, first, count, seed=0).cumsum() * 1e3 / rate).tolist()


async def asked(client: Client, bodies: Sequence[bytes], times_ms: Sequence[float]) -> list[Reply | None]:
    """Ask at given times, whoever has been answered; None for a connection that failed."""
    with progress_bar("requests") as advance:
        calls = await open_loop(lambda i: client.post(PATH, bodies[i % len(bodies)]), times_ms, advance)
    return [call.reply for call in calls]


def summary(
    replies: Sequence[Reply | None], samples: Sequence[Sample], budget_ms: float | Sequence[float]
) -> dict[str, float]:
    """Return shares of all requests, and of those that were admitted; budgets may differ by request."""
    right = on_time = refused = failed = late = cut = 0.0
    budgets_ms = np.broadcast_to(np.asarray(budget_ms, dtype=float), len(replies)).tolist()
    for place, (reply, own_ms) in enumerate(zip(replies, budgets_ms, strict=True)):
        if reply is None or reply.status not in (200, 429):
            failed += 1
        elif reply.status == 429:
            refused += 1
            late += reply.took_ms > AT_ONCE * own_ms
        else:
            is_on_time = reply.took_ms <= own_ms
            on_time += is_on_time
            cut += reply.body.get("tempovlm", {}).get("deadline") == "cut"
            text = reply.body["choices"][0]["message"]["content"] or ""
            right += is_on_time * score(samples[place % len(samples)], text)
    count, admitted = len(replies), len(replies) - refused - failed
    return {
        "requests": count,
        "right_on_time": right / count,
        "on_time_of_admitted": on_time / admitted if admitted else float("nan"),
        "cut_of_admitted": cut / admitted if admitted else float("nan"),
        "refused": refused / count,
        "refused_late": late / count,
        "failed": failed / count,
    }


class Asking:
    """Questions for servers, with a cap of tokens, and the servers that the flags name."""

    def __init__(self, flags: argparse.Namespace, samples: Sequence[Sample]) -> None:
        self.flags, self.samples = flags, samples
        fields = {} if flags.max_tokens is None else {"max_tokens": flags.max_tokens}
        self.plain = [body_of(one, None, **fields) for one in samples]

    def bodies(self, budget_ms: float) -> list[bytes]:
        """Return a body for each sample, with a budget."""
        return [json.dumps(json.loads(one) | {"latency_budget_ms": budget_ms}).encode() for one in self.plain]

    @contextmanager
    def client(self, *given: str) -> Iterator[Client]:
        """Return a client of a server that is warmed up: one of its own, or the one that runs."""
        if self.flags.url is not None:
            yield self._warmed(client_of(self.flags.url))
            return
        flags = ("--device", self.flags.device, *given)
        with serving(self.flags.model, *flags, cores=self.flags.server_cores) as server:
            yield self._warmed(server.client())

    def _warmed(self, client: Client) -> Client:
        try:
            replies = asyncio.run(one_by_one(client, self.plain[:WARM]))
        except OSError as error:
            where = f"http://{client.host}:{client.port}"
            raise UserError(f"{where}: no answer ({error.strerror or error}); start a server there") from None
        for reply in replies:
            if reply.status != 200:
                raise UserError(
                    f"{client.host}:{client.port}: status {reply.status} for a question without a budget"
                )
        return Client(client.host, client.port)  # connections belong to a loop, which has ended


def measure_overhead(client: Client, asking: Asking) -> dict[str, float]:
    """Return what the server adds to the engine's time."""
    replies = asyncio.run(one_by_one(client, asking.plain[:ALONE]))
    timings = [one.body["tempovlm"]["timings_ms"] for one in replies]
    extra_ms = [r.took_ms - (t["total"] - t["queue"]) for r, t in zip(replies, timings, strict=True)]
    p50, p99 = np.quantile(extra_ms, (0.5, 0.99))
    return {"p50_ms": float(p50), "p99_ms": float(p99), "requests": len(replies)}


def measure_native(client: Client, asking: Asking) -> dict[str, float]:
    """Return the median of an answer at the native setting, and the closed-loop rate with all lanes."""

    async def ask() -> tuple[list[Reply], float]:
        replies = await one_by_one(client, asking.plain[:ALONE])
        rate = await closed_loop(client, asking.plain, asking.flags.callers, min(CLOSED_S, asking.flags.seconds))
        client.close()
        return replies, rate

    replies, rate = asyncio.run(ask())
    return {"p50_ms": float(np.median([one.took_ms for one in replies])), "answers_per_s": rate}


async def keep_asking(
    client: Client, bodies: Sequence[bytes], mixed_ms: tuple[float, float], clients: int, seconds: float
) -> list[tuple[int, float, Reply]]:
    """Let clients ask on and on for some time; return the place of each question, its budget and its reply."""
    found: list[tuple[int, float, Reply]] = []
    end_ms = now_ms() + 1e3 * seconds

    async def ask(number: int) -> None:
        draw, place = np.random.default_rng(number), number
        while now_ms() < end_ms:
            budget_ms = float(draw.uniform(*mixed_ms))
            headers = {BUDGET_HEADER: f"{budget_ms:.3f}"}
            reply = await client.post(PATH, bodies[place % len(bodies)], headers)
            found.append((place, budget_ms, reply))
            if reply.status != 200:
                await asyncio.sleep(max(0.0, budget_ms - reply.took_ms) / 1e3)
            place += clients

    await asyncio.gather(*(ask(number) for number in range(clients)))
    client.close()
    return found


def measure_mixed(client: Client, asking: Asking, native_ms: float) -> dict[str, Any]:
    """Return shares of requests of several clients with mixed budgets, and the settings that were chosen most."""
    flags = asking.flags
    low_ms, high_ms = flags.mixed_ms or [native_ms * share for share in MIXED]
    asked = asyncio.run(keep_asking(client, asking.plain, (low_ms, high_ms), flags.clients, flags.seconds))
    samples = [asking.samples[place % len(asking.samples)] for place, _, _ in asked]
    answers = [reply for _, _, reply in asked if reply.status == 200]
    settings = Counter("/".join(map(str, one.body["tempovlm"]["knobs"].values())) for one in answers)
    about = {
        "clients": flags.clients,
        "budgets_ms": [low_ms, high_ms],
        "answers_per_s": len(answers) / flags.seconds,
    }
    found = summary([reply for *_, reply in asked], samples, [budget_ms for _, budget_ms, _ in asked])
    return about | found | {"most_used": dict(settings.most_common(5))}


def load_rows(
    name: str, client: Client, asking: Asking, native: dict[str, float], keep: Callable[[dict[str, Any]], object]
) -> None:
    """Hand over a row for each kind of arrivals and load."""
    flags, budget_ms = asking.flags, asking.flags.budget * native["p50_ms"]
    bodies = asking.bodies(budget_ms)
    sources = {POISSON: POISSON} | ({"trace": str(flags.trace)} if flags.trace else {})
    for arrivals, source in sources.items():
        for load in flags.loads:
            rate = load * native["answers_per_s"]
            count = max(int(rate * flags.seconds), 50)
            replies = asyncio.run(asked(client, bodies, arrivals_ms(source, rate, count)))
            client = Client(client.host, client.port)
            found = summary(replies, asking.samples, budget_ms)
            keep({"server": name, "arrivals": arrivals, "load": load, "budget_ms": budget_ms} | found)


def measure_refusal(client: Client, asking: Asking) -> dict[str, float]:
    """Return the time from the body's last byte to the refusal."""
    bodies = asking.bodies(1.0)[:REFUSALS]
    asyncio.run(one_by_one(Client(client.host, client.port), bodies[:8]))
    replies = asyncio.run(one_by_one(client, bodies))
    p50, p99 = np.quantile([one.sent_ms for one in replies], (0.5, 0.99))
    refused = sum(one.status == 429 for one in replies)
    return {"p50_ms": float(p50), "p99_ms": float(p99), "requests": len(replies), "refused": refused}


def measure_memory(flags: argparse.Namespace) -> dict[str, float]:
    """Return what waiting requests with large pictures hold, in megabytes."""
    from PIL import Image

    blobs = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blobs).resize((4000, 3000)).save(file, "JPEG", quality=95)
    url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": url}}]
    asked = {"messages": [{"role": "user", "content": content}], "latency_budget_ms": 1e6}
    body, most = json.dumps(asked).encode(), 0.0
    given = ("--device", flags.device, "--max_queue", str(2 * WAITING))
    with serving(flags.model, *given, cores=flags.server_cores) as server:

        async def ask() -> None:
            nonlocal most
            client = server.client()
            await client.post(PATH, body)
            tasks = [asyncio.create_task(client.post(PATH, body)) for _ in range(WAITING)]
            while not all(task.done() for task in tasks):
                most = max(most, server.rss_mb())
                await asyncio.sleep(0.05)

        idle = server.rss_mb()
        asyncio.run(ask())
    bodies = WAITING * len(body) / 2**20
    return {"idle_mb": idle, "most_mb": most, "bodies_mb": bodies, "above_mb": most - idle - bodies}


def measure_policy(asking: Asking, found: dict[str, Any], keep: Callable[[], object]) -> None:
    """Measure the parts that ask one server as it is by default; `keep` is called after each."""
    parts = asking.flags.parts
    with asking.client() as first:

        def fresh() -> Client:
            return Client(first.host, first.port)

        if "overhead" in parts:
            found["overhead"] = measure_overhead(fresh(), asking)
        if "refusal" in parts:
            found["refusal"] = measure_refusal(fresh(), asking)
        keep()
        native = measure_native(fresh(), asking) if {"mixed", "load"} & set(parts) else {}
        if "mixed" in parts:
            found["mixed"] = measure_mixed(fresh(), asking, native["p50_ms"])
            keep()
        if "load" in parts:
            found["load"] = [{"native": native}]
            if POLICY in asking.flags.servers:
                load_rows(POLICY, fresh(), asking, native, _adding(found, keep))


def _adding(found: dict[str, Any], keep: Callable[[], object]) -> Callable[[dict[str, Any]], None]:
    def add(row: dict[str, Any]) -> None:
        found["load"].append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        keep()

    return add


def read_flags() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="pocket", help="pocket, or a model folder, also one of `tempovlm model random`")
    add("--device", default="auto", help="of the servers that are started: auto, cpu, cuda or cuda:N")
    add("--url", help="address of a running server of --model, which is asked instead of starting any")
    add(
        "--server_cores",
        type=int,
        nargs="+",
        default=(),
        metavar="N",
        help="cores of the servers that are started",
    )
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured; default: all")
    add(
        "--servers",
        nargs="+",
        choices=(POLICY, TABLE, SHEDS),
        default=(POLICY, TABLE, SHEDS),
        help="that are under load; default: all",
    )
    add(
        "--loads",
        type=float,
        nargs="+",
        default=(0.5, 1.0, 1.5, 2.2),
        help="arrivals over native capacity; default: 0.5 1.0 1.5 2.2",
    )
    add("--budget", type=float, default=2.0, help="times the native median; default: 2")
    add("--seconds", type=float, default=40.0, help="seconds of each load, and of `mixed`; default: 40")
    add("--callers", type=int, default=2, help="of the closed loop that says what native capacity is; default: 2")
    add("--clients", type=int, default=8, help="of `mixed`; default: 8")
    add(
        "--mixed_ms", type=float, nargs=2, metavar=("LOW", "HIGH"), help="default: 1 and 3 times the native median"
    )
    add("--max_tokens", type=int, help="most tokens of an answer; default: the server's own")
    add("--num_samples", type=int, default=200, help="questions; default: 200")
    add("--trace", type=Path, help="CSV with a column TIMESTAMP, whose second half is replayed")
    add("--json", type=Path, help="file to write; standard output without it")
    flags = parser.parse_args()
    if flags.trace is not None and not flags.trace.is_file():
        parser.error(f"--trace {flags.trace}: no such file")
    if flags.url is not None and ("memory" in flags.parts or {TABLE, SHEDS} & set(flags.servers)):
        parser.error(
            "--url: memory, table and native_sheds need servers of their own; leave them out of --parts and "
            "--servers"
        )
    try:
        check_cores(flags.server_cores)
        if flags.url is not None:
            client_of(flags.url)
    except UserError as error:
        parser.error(str(error))
    return flags


def main() -> None:
    """Measure the parts, and print or write; a fault that the user can mend is one line."""
    try:
        measure(read_flags())
    except UserError as error:
        sys.exit(f"error: {error.flagged}")


def measure(flags: argparse.Namespace) -> None:
    """Measure the parts, and print or write."""
    asking = Asking(flags, samples_of(flags.num_samples))
    found: dict[str, Any] = {"stamp": stamp_of(flags.model, flags.device, flags.server_cores)}

    def keep() -> None:
        if flags.json is not None:
            write_json(found, flags.json)

    if set(flags.parts) - {"memory"}:
        measure_policy(asking, found, keep)
    for server, given in ((TABLE, ("--policy", "table")), (SHEDS, NATIVE)):
        if "load" in flags.parts and server in flags.servers:
            with asking.client(*given) as client:
                load_rows(server, client, asking, found["load"][0]["native"], _adding(found, keep))
    if "memory" in flags.parts:
        found["memory"] = measure_memory(flags)
    write_json(found, flags.json)


if __name__ == "__main__":
    main()
