"""Measures `tempovlm serve` by requests over HTTP: what it adds, who is on time under load, refusals and memory.

Starts the server as a process of its own, and asks it questions of the generated data sets with their pictures.

- `overhead`: one client on a kept connection; the client's time less the engine's own time of the same answer;
- `load`: arrivals that wait for nobody (Poisson, and with `--trace` a file's, scaled) at shares of the closed-loop
  rate at the native setting; each request has `--budget` times the native median. By the policy, and by a server
  whose only setting is the native one, which sheds what it could not answer in time;
- `refusal`: budgets that no setting fits; from the last byte of the body to the reply;
- `memory`: pictures of 12 megapixels that wait, above an idle server and their bodies.

Right and on time are shares of all requests. Times are the client's; it runs on the same machine.

    python benchmarks/serving.py --json benchmarks/results/serving_cpu.json
    python benchmarks/serving.py --parts load --trace AzureLLMInferenceTrace_code.csv --loads 0.5 1.0
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import csv
import io
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from deadlines import samples_of
from http_client import Client, Reply
from output import write_json
from tempovlm.core.progress import progress_bar
from tempovlm.core.units import now_ms
from tempovlm.data.sample import Sample
from tempovlm.data.scoring import score
from tempovlm.engine.threads import pick_device

PARTS = ("overhead", "load", "refusal", "memory")
PATH = "/v1/chat/completions"
ALONE, CLOSED_S = 100, 10.0
REFUSALS, WAITING = 200, 100
START_S = 180.0
NATIVE = ("--tiers", "high", "--top_k", "8", "--num_blocks", "16")


@dataclass(frozen=True, slots=True)
class Server:
    """A running server: its client's address and its process."""

    port: int
    process: subprocess.Popen[bytes]

    def client(self) -> Client:
        """Return a client of it."""
        return Client("127.0.0.1", self.port)

    def rss_mb(self) -> float:
        """Return the memory that its process holds, in megabytes."""
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())
        return int(found[1]) / 1024 if found else float("nan")


@contextmanager
def serving(model: str, *flags: str) -> Iterator[Server]:
    """Run a server while the block runs."""
    command = [sys.executable, "-m", "tempovlm.cli.main", "serve", "--model", model, "--port", "0", *flags]
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        process = subprocess.Popen(command, stderr=log)
        try:
            yield Server(port_of(process, Path(log.name)), process)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def port_of(process: subprocess.Popen[bytes], log: Path) -> int:
    """Return the port that a server's log names once it has started."""
    end_ms = now_ms() + 1e3 * START_S
    while process.poll() is None and now_ms() < end_ms:
        found = re.search(r"http://127\.0\.0\.1:(\d+)\S* serves", log.read_text())
        if found:
            return int(found[1])
        time.sleep(0.05)
    sys.exit(f"the server did not start:\n{log.read_text()}")


def body_of(sample: Sample, budget_ms: float | None) -> bytes:
    """Return the body of a request about a sample."""
    kind = "png" if sample.image_path.suffix == ".png" else "jpeg"
    picture = base64.b64encode(sample.image_path.read_bytes()).decode()
    content = [
        {"type": "text", "text": sample.question},
        {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{picture}"}},
    ]
    asked = {"messages": [{"role": "user", "content": content}], "style": sample.style}
    return json.dumps(asked | ({} if budget_ms is None else {"latency_budget_ms": budget_ms})).encode()


async def one_by_one(client: Client, bodies: Sequence[bytes]) -> list[Reply]:
    """Ask one after the other on one connection."""
    return [await client.post(PATH, body) for body in bodies]


async def closed_loop(client: Client, bodies: Sequence[bytes], callers: int, seconds: float) -> float:
    """Return the answers a second that some callers get who ask again at once."""
    count, end_ms, begin_ms = 0, now_ms() + 1e3 * seconds, now_ms()

    async def call(first: int) -> None:
        nonlocal count
        number = first
        while now_ms() < end_ms:
            reply = await client.post(PATH, bodies[number % len(bodies)])
            count += reply.status == 200
            number += callers

    await asyncio.gather(*(call(i) for i in range(callers)))
    return 1e3 * count / (now_ms() - begin_ms)


async def open_loop(client: Client, bodies: Sequence[bytes], arrivals_s: Sequence[float]) -> list[Reply | None]:
    """Ask at given times, whoever has been answered; None for a connection that failed."""
    begin_ms = now_ms()

    async def call(place: int) -> Reply | None:
        await asyncio.sleep(max(0.0, arrivals_s[place] - (now_ms() - begin_ms) / 1e3))
        try:
            return await client.post(PATH, bodies[place % len(bodies)])
        except OSError:
            return None

    with progress_bar("requests") as advance:
        tasks = [asyncio.create_task(call(i)) for i in range(len(arrivals_s))]
        for done, task in enumerate(tasks, 1):
            await task
            advance(done, len(tasks))
        return [task.result() for task in tasks]


def poisson(rate: float, count: int, seed: int = 0) -> list[float]:
    """Return the times of `count` arrivals, in seconds."""
    return np.random.default_rng(seed).exponential(1 / rate, count).cumsum().tolist()


def traced(path: Path, rate: float, count: int) -> list[float]:
    """Return the times of the first requests of a trace's second half, scaled to a mean rate."""
    with path.open(newline="") as file:
        stamps = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in csv.DictReader(file)]
    half = np.array(stamps[len(stamps) // 2 :][:count])
    times = half - half[0]
    return (times * (len(times) - 1) / (times[-1] * rate)).tolist()


def summary(replies: Sequence[Reply | None], samples: Sequence[Sample], budget_ms: float) -> dict[str, float]:
    """Return shares of all requests, and of those that were admitted."""
    right = on_time = refused = failed = late = 0.0
    for place, reply in enumerate(replies):
        if reply is None or reply.status not in (200, 429):
            failed += 1
        elif reply.status == 429:
            refused += 1
            late += reply.took_ms > 0.1 * budget_ms  # told too late
        else:
            is_on_time = reply.took_ms <= budget_ms
            on_time += is_on_time
            text = reply.body["choices"][0]["message"]["content"] or ""
            right += is_on_time * score(samples[place % len(samples)], text)
    count, admitted = len(replies), len(replies) - refused - failed
    return {
        "requests": count,
        "right_on_time": right / count,
        "on_time_of_admitted": on_time / admitted if admitted else float("nan"),
        "refused": refused / count,
        "refused_late": late / count,
        "failed": failed / count,
    }


def measure_overhead(flags: argparse.Namespace, samples: Sequence[Sample]) -> dict[str, float]:
    """Return what the server adds to the engine's time, and the native median."""
    bodies = [body_of(one, None) for one in samples[:ALONE]]
    with serving(flags.model) as server:
        asyncio.run(one_by_one(server.client(), bodies[:8]))
        replies = asyncio.run(one_by_one(server.client(), bodies))
    timings = [one.body["tempovlm"]["timings_ms"] for one in replies]
    extra_ms = [r.took_ms - (t["total"] - t["queue"]) for r, t in zip(replies, timings, strict=True)]
    p50, p99 = np.quantile(extra_ms, (0.5, 0.99))
    return {"p50_ms": float(p50), "p99_ms": float(p99), "requests": len(replies)}


def measure_native(flags: argparse.Namespace, samples: Sequence[Sample]) -> dict[str, float]:
    """Return the median of an answer at the native setting, and the closed-loop rate with all lanes."""
    bodies = [body_of(one, None) for one in samples]
    with serving(flags.model) as server:
        asyncio.run(one_by_one(server.client(), bodies[:8]))
        replies = asyncio.run(one_by_one(server.client(), bodies[:ALONE]))
        rate = asyncio.run(closed_loop(server.client(), bodies, flags.callers, CLOSED_S))
    return {"p50_ms": float(np.median([one.took_ms for one in replies])), "answers_per_s": rate}


def measure_load(flags: argparse.Namespace, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Return a row for each kind of arrivals, load and server."""
    native = measure_native(flags, samples)
    budget_ms = flags.budget * native["p50_ms"]
    bodies, rows = [body_of(one, budget_ms) for one in samples], []
    for name, given in (("policy", ()), ("native_sheds", NATIVE)):
        with serving(flags.model, *given) as server:
            asyncio.run(one_by_one(server.client(), bodies[:30]))
            for arrivals in ("poisson", *(["trace"] if flags.trace else [])):
                for load in flags.loads:
                    rate = load * native["answers_per_s"]
                    count = max(int(rate * flags.seconds), 50)
                    times = poisson(rate, count) if arrivals == "poisson" else traced(flags.trace, rate, count)
                    replies = asyncio.run(open_loop(server.client(), bodies, times))
                    found = summary(replies, samples, budget_ms)
                    rows.append(
                        {"server": name, "arrivals": arrivals, "load": load, "budget_ms": budget_ms} | found
                    )
                    print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return [{"native": native}, *rows]


def measure_refusal(flags: argparse.Namespace, samples: Sequence[Sample]) -> dict[str, float]:
    """Return the time from the body's last byte to the refusal."""
    bodies = [body_of(one, 1.0) for one in samples[:REFUSALS]]
    with serving(flags.model) as server:
        asyncio.run(one_by_one(server.client(), bodies[:8]))
        replies = asyncio.run(one_by_one(server.client(), bodies))
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
    with serving(flags.model, "--max_queue", str(2 * WAITING)) as server:

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


def read_flags() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", help="pocket, or a model folder")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--loads", type=float, nargs="+", default=(0.5, 1.0, 1.5, 2.2), help="of native capacity")
    parser.add_argument("--budget", type=float, default=2.0, help="times the native median")
    parser.add_argument("--seconds", type=float, default=40.0, help="length of the arrivals at a load")
    parser.add_argument(
        "--callers", type=int, default=2, help="of the closed loop that says what native capacity is"
    )
    parser.add_argument("--num_samples", type=int, default=200)
    parser.add_argument("--trace", type=Path, help="CSV with a column TIMESTAMP, whose second half is replayed")
    parser.add_argument("--json", type=Path, help="file to write; standard output without it")
    flags = parser.parse_args()
    if flags.trace is not None and not flags.trace.is_file():
        parser.error(f"--trace {flags.trace}: no such file")
    return flags


def main() -> None:
    """Measure the parts, and print or write."""
    flags = read_flags()
    samples = samples_of(flags.num_samples)
    found: dict[str, Any] = {}
    if "overhead" in flags.parts:
        found["overhead"] = measure_overhead(flags, samples)
    if "refusal" in flags.parts:
        found["refusal"] = measure_refusal(flags, samples)
    if "memory" in flags.parts:
        found["memory"] = measure_memory(flags)
    if "load" in flags.parts:
        found["load"] = measure_load(flags, samples)
    write_json({"stamp": stamp_of(flags.model)} | found, flags.json)


def stamp_of(model: str) -> dict[str, Any]:
    """Return the stamp of the model on this machine."""
    from tempovlm import api

    return api.load(model, device=str(pick_device("auto")), progress=False).stamp().to_json()


if __name__ == "__main__":
    main()
