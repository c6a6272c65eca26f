#!/usr/bin/env bash
# @histogram.time() on an async function records microseconds for an answer of 0.3 s, and its failures are not counted.
#
# Versions: prometheus-client 0.26.0.
# Behaviour: the decorators time(), count_exceptions() and track_inprogress() call the function and are done. Calling an
#   async function, or a generator that streams an answer, makes an object and runs none of it. The same three as
#   `with` blocks inside the function are right.
# Output: for each kind of function: seconds recorded, failures counted of one, answers in progress in its midst.
#   Plain function 0.3, 1, 1; decorated coroutine 0.0, 0, 0; decorated stream 0.0, 0, 0; coroutine with blocks
#   0.3, 1, 1.
# Wrong guess: a decorator measures a call as a block does, and one that cannot do so for a coroutine refuses it. The
#   p99 of such a server is its smallest bucket, no alarm about failures ever rings, and the count of requests is right.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check prometheus-client==0.26.0
"$dir/venv/bin/python" - <<'EOF'
import asyncio
import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

TAKES_S = 0.3


class Metrics:
    """The three metrics of one kind of function, and the answers in progress that it saw while it ran."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.latency = Histogram("latency_seconds", "of an answer", registry=self.registry)
        self.failures = Counter("failures", "of answers", registry=self.registry)
        self.running = Gauge("running", "answers", registry=self.registry)
        self.seen = 0

    def decorate(self, function):
        counted = self.failures.count_exceptions()(self.running.track_inprogress()(function))
        return self.latency.time()(counted)

    def look(self):
        self.seen = int(self.registry.get_sample_value("running"))

    def record(self):
        """Calls, seconds, failures and answers in progress."""
        names = "latency_seconds_count", "latency_seconds_sum", "failures_total"
        calls, seconds, failures = (self.registry.get_sample_value(name) for name in names)
        return int(calls), round(seconds, 1), int(failures), self.seen


def plain(metrics):
    @metrics.decorate
    def answer():
        time.sleep(TAKES_S)
        metrics.look()
        raise TimeoutError

    answer()


def coroutine(metrics):
    @metrics.decorate
    async def answer():
        await asyncio.sleep(TAKES_S)
        metrics.look()
        raise TimeoutError

    asyncio.run(answer())


def stream(metrics):
    @metrics.decorate
    def answer():
        yield "a"
        time.sleep(TAKES_S)
        metrics.look()
        raise TimeoutError

    "".join(answer())


def blocks(metrics):
    async def answer():
        with metrics.latency.time(), metrics.failures.count_exceptions(), metrics.running.track_inprogress():
            await asyncio.sleep(TAKES_S)
            metrics.look()
            raise TimeoutError

    asyncio.run(answer())


def record(kind):
    metrics = Metrics()
    try:
        kind(metrics)
    except TimeoutError:
        return metrics.record()
    raise AssertionError("the failure did not come out")


for kind, is_right in {plain: True, coroutine: False, stream: False, blocks: True}.items():
    calls, seconds, failures, running = record(kind)
    print(f"{kind.__name__}: {calls} call, {seconds} s, {failures} failures, {running} in progress")
    assert calls == 1, f"{kind.__name__}: the call is not counted"
    assert (seconds > 0.2) == is_right, f"{kind.__name__}: {seconds} s"
    assert (failures, running) == ((1, 1) if is_right else (0, 0)), f"{kind.__name__}: failures or progress"
EOF
