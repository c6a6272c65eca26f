"""Measures `tempovlm serve`: its own time, and how many requests are answered in time as they come faster.

For each policy a server of its own is started. `overhead` has the total that a client sees less the engine's own, of
one client on one connection. Then questions of the generated data sets come in a Poisson process at several loads
(at 1 there come as many a second as the native setting answers), with a budget of twice the native median. A row has
the share of admitted answers in time, the share of all questions answered right and in time, and the refusals. The
policy `fixed` runs the native setting and sheds requests that cannot make it: the server without knobs.

    python benchmarks/serving.py --json serving_cpu.json
    python benchmarks/serving.py --loads 1.2 --num_samples 2000 --policies auto
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from company_cpu import questions
from output import write_json

LOADS = (0.5, 1.0, 1.5, 2.2)
NATIVE_SAMPLES = 60
PATH = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Reply:
    """A response: its status, its object, and the milliseconds that its client waited."""

    status: int
    body: dict[str, Any]
    took_ms: float


@contextmanager
def served(words: Sequence[str]) -> Iterator[int]:
    """Run a server and yield its port; its log is thrown away."""
    command = [sys.executable, "-m", "tempovlm", "serve", "--port", "0", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if found := re.search(r"http://[\d.]+:(\d+) serves", line):
                break
        else:
            sys.exit(f"the server did not start: {said.strip()}")
        drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
        try:
            yield int(found[1])
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()
            drain.wait()


def body_of(sample: Any, budget_ms: float | None) -> bytes:
    """A question of a data set as the body of a request."""
    picture = base64.b64encode(Path(sample.image_path).read_bytes()).decode()
    parts = [
        {"type": "text", "text": sample.question},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
    ]
    record = {"messages": [{"role": "user", "content": parts}], "style": sample.style}
    return json.dumps(record | ({} if budget_ms is None else {"latency_budget_ms": budget_ms})).encode()


class Client:
    """Asks over connections that are kept."""

    def __init__(self, port: int) -> None:
        self._port, self._free = port, list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]()

    async def ask(self, body: bytes) -> Reply:
        """Send a request on a free connection, or a new one."""
        begin = time.perf_counter()
        reader, writer = self._free.pop() if self._free else await asyncio.open_connection("127.0.0.1", self._port)
        head = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        said = await reader.readuntil(b"\r\n\r\n")
        length = int(re.search(rb"(?i)content-length: (\d+)", said)[1])  # type: ignore[index]
        data = await reader.readexactly(length)
        took_ms = (time.perf_counter() - begin) * 1e3
        self._free.append((reader, writer))
        return Reply(int(said.split()[1]), json.loads(data), took_ms)


async def one_by_one(client: Client, bodies: Sequence[bytes]) -> list[Reply]:
    """Ask each question when the one before is answered."""
    return [await client.ask(body) for body in bodies]


async def as_they_come(client: Client, bodies: Sequence[bytes], per_s: float, seed: int = 0) -> list[Reply]:
    """Ask in a Poisson process, whatever is still unanswered."""
    draw, tasks, at = random.Random(seed), list[asyncio.Task[Reply]](), time.perf_counter()
    for body in bodies:
        at += draw.expovariate(per_s)
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        tasks.append(asyncio.create_task(client.ask(body)))
    return list(await asyncio.gather(*tasks))


def quantile(values: Sequence[float], share: float) -> float | None:
    """A quantile, rounded; None of nothing."""
    return round(sorted(values)[min(len(values) - 1, int(share * len(values)))], 2) if values else None


def overhead(replies: Sequence[Reply]) -> dict[str, float | None]:
    """The server's time beside the engine's: reading, waiting, writing, and both ends of the connection."""
    times_ms = [(one.took_ms, one.body["tempovlm"]["timings_ms"]) for one in replies if one.status == 200]
    beside_ms = [took_ms - (stages["total"] - stages["queue"]) for took_ms, stages in times_ms]
    return {"p50_ms": quantile(beside_ms, 0.5), "p99_ms": quantile(beside_ms, 0.99)}


def row_of(samples: Sequence[Any], replies: Sequence[Reply], score: Callable[[Any, str], float]) -> dict[str, Any]:
    """Count the questions: of all, of the admitted, and of the refused."""
    pairs = list(zip(samples, replies, strict=True))
    admitted = [(sample, one) for sample, one in pairs if one.status == 200]
    in_time = [(sample, one) for sample, one in admitted if one.body["tempovlm"]["deadline"] == "met"]
    right = sum(score(sample, one.body["choices"][0]["message"]["content"]) for sample, one in in_time)
    refused = [one for one in replies if one.status != 200]
    settings = Counter("/".join(map(str, one.body["tempovlm"]["knobs"].values())) for _, one in admitted)
    return {
        "num": len(pairs),
        "admitted": len(admitted),
        "on_time": round(len(in_time) / len(admitted), 4) if admitted else None,
        "right_and_on_time": round(right / len(pairs), 4),
        "deadlines": dict(Counter(one.body["tempovlm"]["deadline"] for _, one in admitted)),
        "refused": dict(Counter(one.body["error"]["code"] for one in refused)),
        "refusal_p50_ms": quantile([one.took_ms for one in refused], 0.5),
        "refusal_p99_ms": quantile([one.took_ms for one in refused], 0.99),
        "settings": dict(settings.most_common(8)),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run all servers and loads."""
    samples, score = questions(args.num_samples, args.data_dir)
    result: dict[str, Any] = {"budget_ratio": args.budget_ratio, "rows": []}
    some = [body_of(sample, None) for sample in (samples * NATIVE_SAMPLES)[:NATIVE_SAMPLES]]
    for policy in args.policies:
        with served(["--model", args.model, "--policy", policy]) as port:
            native = asyncio.run(one_by_one(Client(port), some))
            stages = [one.body["tempovlm"]["timings_ms"] for one in native]
            if "native_ms" not in result:
                result["native_ms"] = round(statistics.median(s["total"] - s["queue"] for s in stages), 2)
            budget_ms = round(args.budget_ratio * result["native_ms"], 1)
            bodies = [body_of(sample, budget_ms) for sample in samples]
            result.setdefault("overhead", {})[policy] = overhead(native)
            for load in args.loads:
                per_s = load * 1e3 / result["native_ms"]
                replies = asyncio.run(as_they_come(Client(port), bodies, per_s))
                row = {"policy": policy, "load": load, "per_s": round(per_s, 2), "budget_ms": budget_ms}
                result["rows"].append(row | row_of(samples, replies, score))
                print(json.dumps(result["rows"][-1]), file=sys.stderr)
    return result


def stamp(model: str) -> dict[str, Any]:
    """The stamp of the figures."""
    from tempovlm.api import load

    return load(model, warmup=False, progress=False).stamp("synthetic").to_json()


def read_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", help="pocket, or a model folder")
    parser.add_argument("--policies", nargs="+", default=["auto", "fixed"], help="a server for each")
    parser.add_argument("--loads", type=float, nargs="+", default=list(LOADS), help="over the native capacity")
    parser.add_argument("--budget_ratio", type=float, default=2.0, help="budget over the native median")
    parser.add_argument("--num_samples", type=int, default=400, help="questions a row")
    parser.add_argument("--data_dir", type=Path, help="folder of the data; by default that of the product")
    parser.add_argument("--json", type=Path, help="file to write; by default standard output")
    return parser.parse_args(argv)


def main() -> None:
    """Measure and write."""
    args = read_flags()
    write_json({"stamp": stamp(args.model), **measure(args)}, args.json)


if __name__ == "__main__":
    main()
