"""Times the stages of answers by a CPU's back ends, in turn on the same pictures, alone and beside busy processes.

Every back end answers at the native setting with the same number of threads; `--before FOLDER` adds the package
of another checkout, which answers in a process of its own while all others wait. The result has medians of the
stages; the median, p95 and p99 of whole answers; and how many answers differ from those of torch in float32.

    python benchmarks/backends.py --json benchmarks/results/backends_cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from deadlines import samples_of
from tempovlm import api
from tempovlm.core.request import STAGES
from tempovlm.data.sample import Sample
from tempovlm.engine.threads import start_torch

BUSY = "while True: sum(i * i for i in range(10000))"
WARM = 4
BEFORE = """
import json, sys
from tempovlm.engine.threads import prepare
prepare(int(sys.argv[2]) or None)
from tempovlm import api
model = api.load(sys.argv[1], calibrate=False, progress=False, device="cpu", threads=int(sys.argv[2]) or None)
for line in sys.stdin:
    picture, question, style = json.loads(line)
    answer = model.answer(picture, question, style=style)
    print(json.dumps([answer.text, answer.timings_ms]), flush=True)
"""

Times = dict[str, float]
Ask = Callable[[Sample], tuple[str, Times]]


def load_all(model: str, threads: int | None) -> dict[str, api.TempoVLM]:
    """Each back end, with the type of its products where it has several."""
    start_torch(threads)  # before torch is imported, which fixes how threads wait
    import torch

    quick: dict[str, Any] = {"calibrate": False, "progress": False, "device": "cpu", "threads": threads}
    return {
        "torch": api.load(model, backend="torch", **quick),
        "kernels_float32": api.load(model, backend="kernels", dtype=torch.float32, **quick),
        "kernels": api.load(model, backend="kernels", **quick),
    }


def asked_here(model: api.TempoVLM) -> Ask:
    """Answers of a loaded model: text, and times in ms."""

    def ask(sample: Sample) -> tuple[str, Times]:
        answer = model.answer(sample.image_path, sample.question, style=sample.style)
        return answer.text, dict(answer.timings_ms)

    return ask


def asked_there(folder: Path, model: str, threads: int | None) -> Ask:
    """Answers of another checkout's package, in a process of its own."""
    child = subprocess.Popen(
        [sys.executable, "-c", BEFORE, model, str(threads or 0)],
        env={**os.environ, "PYTHONPATH": str(folder / "src")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def ask(sample: Sample) -> tuple[str, Times]:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps([str(sample.image_path), sample.question, sample.style]) + "\n")
        child.stdin.flush()
        text, timings_ms = json.loads(child.stdout.readline())
        return text, timings_ms

    return ask


def in_turn(asks: dict[str, Ask], samples: list[Sample]) -> dict[str, list[tuple[str, Times]]]:
    """Answers by back end."""
    answers: dict[str, list[tuple[str, Times]]] = {name: [] for name in asks}
    for sample in [*samples[:WARM], *samples]:
        for name, ask in asks.items():
            answers[name].append(ask(sample))
    return {name: some[WARM:] for name, some in answers.items()}


def summary(answers: list[tuple[str, Times]], texts: list[str]) -> dict[str, Any]:
    """Times in ms, and the number of answers other than `texts`."""
    times = [timings_ms for _, timings_ms in answers]
    p50, p95, p99 = np.percentile([one["total"] for one in times], [50, 95, 99])
    stages = {name: round(float(np.median([one.get(name, 0.0) for one in times])), 2) for name in STAGES}
    others = sum(text != wanted for (text, _), wanted in zip(answers, texts, strict=True))
    return {"p50": round(p50, 1), "p95": round(p95, 1), "p99": round(p99, 1), **stages, "other_answers": others}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", help="pocket, or a model folder")
    parser.add_argument("--threads", type=int, help="of an operation; by default those of the product")
    parser.add_argument("--before", type=Path, help="checkout whose package answers too")
    parser.add_argument("--num_samples", type=int, default=80, help="questions")
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, 2], help="busy processes beside")
    parser.add_argument("--json", type=Path, help="file to write; standard output without it")
    args = parser.parse_args()
    models = load_all(args.model, args.threads)
    asks = {name: asked_here(one) for name, one in models.items()}
    if args.before is not None:
        asks["before"] = asked_there(args.before, args.model, args.threads)
    samples = samples_of(args.num_samples)
    result: dict[str, Any] = {"stamps": {name: one.stamp("synthetic").to_json() for name, one in models.items()}}
    for count in args.neighbours:
        others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
        try:
            answers = in_turn(asks, samples)
        finally:
            for one in others:
                one.kill()
        texts = [text for text, _ in answers["torch"]]
        result[f"beside_{count}"] = {name: summary(some, texts) for name, some in answers.items()}
    text = json.dumps(result, indent=1)
    if args.json is None:
        print(text)
    else:
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
