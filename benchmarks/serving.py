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
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deadlines import samples_of
from output import write_json
from tempovlm.core.progress import progress_bar
from tempovlm.data.sample import Sample
from tempovlm.data.scoring import score
from tempovlm.engine.threads import pick_device
from tempovlm.lab.live.asking import PATH, body_of, closed_loop, one_by_one, open_loop
from tempovlm.lab.live.client import Client, Reply
from tempovlm.lab.live.server import serving
from tempovlm.lab.queueing.arrivals import POISSON, gaps_of, is_drawn, read_trace

PARTS = ("overhead", "load", "refusal", "memory")
ALONE, CLOSED_S = 100, 10.0
REFUSALS, WAITING = 200, 100
NATIVE = ("--tiers", "high", "--top_k", "8", "--num_blocks", "16")


def arrivals_ms(name: str, rate: float, count: int) -> list[float]:
    """Return the times of `count` arrivals at a mean rate a second: drawn, or of a trace's second half."""
    first = 0 if is_drawn(name) else len(read_trace(Path(name))) // 2
    return (gaps_of(name, first, count, seed=0).cumsum() * 1e3 / rate).tolist()


async def asked(client: Client, bodies: Sequence[bytes], times_ms: Sequence[float]) -> list[Reply | None]:
    """Ask at given times, whoever has been answered; None for a connection that failed."""
    with progress_bar("requests") as advance:
        calls = await open_loop(lambda i: client.post(PATH, bodies[i % len(bodies)]), times_ms, advance)
    return [call.reply for call in calls]


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
    sources = {POISSON: POISSON} | ({"trace": str(flags.trace)} if flags.trace else {})
    for name, given in (("policy", ()), ("native_sheds", NATIVE)):
        with serving(flags.model, *given) as server:
            asyncio.run(one_by_one(server.client(), bodies[:30]))
            for arrivals, source in sources.items():
                for load in flags.loads:
                    rate = load * native["answers_per_s"]
                    count = max(int(rate * flags.seconds), 50)
                    replies = asyncio.run(asked(server.client(), bodies, arrivals_ms(source, rate, count)))
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
