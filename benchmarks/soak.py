"""Loads `tempovlm serve` for a long time with good and bad requests, and kills it: does it leak, fail or go late?

Arrivals wait for nobody (Poisson) at `--load` of the closed-loop rate at the native setting. Most ask a question
of the generated data sets within `--budget` times the native median; the others are of `KINDS`. At the end another
server is killed while questions run, and started anew.

- `kinds`: replies by kind and end; `errors` are those that a kind must not get, and connections that failed;
- `late_of_admitted`, `cut_of_admitted`: of answers to ordinary questions, those that came after their budget by
  the client's clock, and those that their deadline ended, which are on time but not whole;
- `rss_mb`: medians of the second and of the last tenth of the time, of each tenth, and the peak;
- `kill`: what the questions that ran got, and the time until the new server answered.

    python benchmarks/soak.py --json benchmarks/results/soak_cpu.json
    python benchmarks/soak.py --minutes 1
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deadlines import samples_of
from output import write_json
from tempovlm.core.units import now_ms
from tempovlm.lab.live.asking import PATH, body_of, closed_loop, one_by_one
from tempovlm.lab.live.server import Server, serving, stamp_of

KINDS = {
    "ordinary": (0.84, {"200", "200 cut", "429"}),
    "vanishing": (0.06, {"gone"}),
    "truncated picture": (0.05, {"400", "429", "200 cut"}),
    "impossible budget": (0.05, {"429"}),
    "50 MB picture": (0.0, {"200", "200 cut", "429"}),
}
"""Kinds of requests: the share of arrivals, and the ends that are right. The last one comes every `LARGE_S`.

An answer that was cut while it waited had no time to find its picture damaged."""

LARGE_S, LARGE_BUDGET_MS, LARGE_SIDE = 30.0, 20_000.0, 4150
MOST_BODY_MB = 80
LOOK_S = 2.0
WARM, CLOSED_S, CALLERS, KILLED = 30, 10.0, 2, 6


@dataclass(slots=True)
class Found:
    """Replies, times and memory of a run.

    Attributes:
        ends: (kind, status) of replies, `cut` with those that the deadline ended, `failed` for a connection.
        took_ms: of ordinary answers. rss_mb: every `LOOK_S` seconds.
    """

    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    took_ms: list[float] = field(default_factory=list)
    rss_mb: list[float] = field(default_factory=list)

    def record(self, budget_ms: float) -> dict[str, Any]:
        """Return it as plain values."""
        tenth = max(1, len(self.rss_mb) // 10)
        tenths_mb = [round(statistics.median(one)) for one in np.array_split(self.rss_mb, 10) if len(one)]
        start_mb = statistics.median(self.rss_mb[tenth : 2 * tenth] or self.rss_mb)
        end_mb = statistics.median(self.rss_mb[-tenth:])
        errors = {f"{kind}: {end}": count for (kind, end), count in self.ends.items() if end not in KINDS[kind][1]}
        kinds: dict[str, dict[str, int]] = {kind: {} for kind in KINDS}
        for (kind, end), count in sorted(self.ends.items()):
            kinds[kind][end] = count
        late = sum(one > budget_ms for one in self.took_ms)
        return {
            "kinds": kinds,
            "errors": errors,
            "late_of_admitted": late / max(1, len(self.took_ms)),
            "cut_of_admitted": self.ends["ordinary", "200 cut"] / max(1, len(self.took_ms)),
            "rss_mb": {"start": start_mb, "end": end_mb, "peak": max(self.rss_mb), "tenths": tenths_mb},
            "rss_growth": end_mb / start_mb - 1,
        }


class Soak:
    """Requests of all kinds to one server."""

    def __init__(self, server: Server, bodies: Sequence[bytes], budget_ms: float) -> None:
        self._server, self._client = server, server.client()
        self._bodies, self._budget_ms, self._random = bodies, budget_ms, random.Random(0)
        asked = json.loads(bodies[0])
        self._truncated = json.dumps(_with_picture(asked, _truncated(_picture_of(asked)))).encode()
        self._impossible = json.dumps(asked | {"latency_budget_ms": 1.0}).encode()
        large = _with_picture(asked, large_picture()) | {"latency_budget_ms": LARGE_BUDGET_MS}
        self._large = json.dumps(large).encode()
        self.found = Found()

    async def run(self, rate: float, seconds: float) -> None:
        """Ask at a mean rate for some time, and wait for the last replies."""
        end_ms, asked = now_ms() + 1e3 * seconds, set[asyncio.Task[None]]()
        beside = [asyncio.create_task(one) for one in (self._look(), self._send_large())]
        due_ms, names = now_ms(), list(KINDS)
        while due_ms < end_ms:
            kind = self._random.choices(names, [KINDS[name][0] for name in names])[0]
            task = asyncio.create_task(self._ask(kind))
            asked.add(task)
            task.add_done_callback(asked.discard)
            due_ms += 1e3 * self._random.expovariate(rate)
            await asyncio.sleep(max(0.0, due_ms - now_ms()) / 1e3)
        await asyncio.gather(*asked)
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        self._client.close()

    async def _ask(self, kind: str) -> None:
        body = self._random.choice(self._bodies)
        if kind == "vanishing":
            await self._vanish(body)
            self.found.ends[kind, "gone"] += 1
            return
        body = {"truncated picture": self._truncated, "impossible budget": self._impossible}.get(kind, body)
        await self._post(kind, body)

    async def _post(self, kind: str, body: bytes) -> None:
        try:
            reply = await self._client.post(PATH, body)
        except OSError:
            self.found.ends[kind, "failed"] += 1
            return
        is_cut = reply.status == 200 and reply.body["tempovlm"]["deadline"] == "cut"
        self.found.ends[kind, f"{reply.status} cut" if is_cut else str(reply.status)] += 1
        if kind == "ordinary" and reply.status == 200:
            self.found.took_ms.append(reply.took_ms)

    async def _vanish(self, body: bytes) -> None:
        """Ask, in part or whole, and go away after some time within the budget."""
        _, writer = await asyncio.open_connection(self._client.host, self._client.port)
        head = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
        whole = self._random.random() < 0.5
        writer.write(head.encode() + (body if whole else body[: len(body) // 2]))
        await asyncio.sleep(self._random.random() * self._budget_ms / 1e3)
        writer.transport.abort()

    async def _send_large(self) -> None:
        while True:
            await self._post("50 MB picture", self._large)
            await asyncio.sleep(LARGE_S)

    async def _look(self) -> None:
        while True:
            self.found.rss_mb.append(self._server.rss_mb())
            await asyncio.sleep(LOOK_S)


def _picture_of(asked: dict[str, Any]) -> bytes:
    url = asked["messages"][0]["content"][1]["image_url"]["url"]
    return base64.b64decode(url.partition(",")[2])


def _with_picture(asked: dict[str, Any], data: bytes) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    text, _ = asked["messages"][0]["content"]
    content = [text, {"type": "image_url", "image_url": {"url": url}}]
    return asked | {"messages": [{"role": "user", "content": content}]}


def _truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def large_picture() -> bytes:
    """Return a PNG of noise, of about 50 MB."""
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (LARGE_SIDE, LARGE_SIDE, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG", compress_level=1)
    return file.getvalue()


async def cut_off(server: Server, bodies: Sequence[bytes]) -> Counter[str]:
    """Kill a server while questions run; return how they ended."""
    client, ends = server.client(), Counter[str]()

    async def ask(body: bytes) -> None:
        try:
            ends[str((await client.post(PATH, body)).status)] += 1
        except OSError:
            ends["connection closed"] += 1

    tasks = [asyncio.create_task(ask(body)) for body in bodies]
    await asyncio.sleep(0.05)
    server.process.kill()
    await asyncio.gather(*tasks)
    return ends


def started(flags: argparse.Namespace, *more: str) -> AbstractContextManager[Server]:
    """Run a server as the flags say."""
    return serving(flags.model, "--device", flags.device, *more, cores=flags.server_cores)


def kill(flags: argparse.Namespace, bodies: Sequence[bytes]) -> dict[str, Any]:
    """Kill a server and start another one; return what became of questions at both."""
    with started(flags) as server:
        asyncio.run(one_by_one(server.client(), bodies[:WARM]))
        ends = asyncio.run(cut_off(server, bodies[:KILLED]))
    begin_ms = now_ms()
    with started(flags) as server:
        replies = asyncio.run(one_by_one(server.client(), bodies[:KILLED]))
        ready_s = (now_ms() - begin_ms) / 1e3
    after = Counter(str(reply.status) for reply in replies)
    return {"killed": dict(ends), "after": dict(after), "answers_again_s": ready_s}


def main() -> None:
    """Load a server, kill another one, and print or write what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", help="pocket, or a model folder")
    parser.add_argument("--device", default="auto", help="of the servers: auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--server_cores",
        type=int,
        nargs="+",
        default=(),
        metavar="N",
        help="cores of the servers; give others by taskset",
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--load", type=float, default=1.2, help="of native capacity")
    parser.add_argument("--budget", type=float, default=2.0, help="times the native median")
    parser.add_argument("--num_samples", type=int, default=200)
    parser.add_argument("--note", default="", help="text for the result, such as what ran beside it")
    parser.add_argument("--json", type=Path, help="file to write; standard output without it")
    flags = parser.parse_args()
    samples = samples_of(flags.num_samples)
    plain = [body_of(one, None) for one in samples]
    with started(flags, "--max_body_mb", str(MOST_BODY_MB)) as server:
        client = server.client()
        native = asyncio.run(one_by_one(client, plain[:WARM]))
        budget_ms = flags.budget * statistics.median(one.took_ms for one in native)
        rate = asyncio.run(closed_loop(server.client(), plain, CALLERS, CLOSED_S))
        bodies = [body_of(one, budget_ms) for one in samples]
        soak = Soak(server, bodies, budget_ms)
        asyncio.run(soak.run(flags.load * rate, 60 * flags.minutes))
    asked = {"minutes": flags.minutes, "load": flags.load, "native_per_s": rate, "budget_ms": budget_ms}
    found = {"note": flags.note, **asked, **soak.found.record(budget_ms), "kill": kill(flags, bodies)}
    stamp = stamp_of(flags.model, flags.device, flags.server_cores)
    write_json({"stamp": stamp} | found, flags.json)


if __name__ == "__main__":
    main()
