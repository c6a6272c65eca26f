"""Times the stages of answers by a CPU's back ends, in turn on the same pictures, alone and beside busy processes.

Every back end answers at the native setting with the same number of threads. The result has medians of the stages;
the median, p95 and p99 of whole answers; and how many answers differ from those of torch.

    python benchmarks/backends.py --json benchmarks/results/backends_cpu.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from deadlines import samples_of
from tempovlm import api
from tempovlm.core.request import STAGES, Answer
from tempovlm.data.sample import Sample
from tempovlm.engine.threads import start_torch

BUSY = "while True: sum(i * i for i in range(10000))"
WARM = 4


def load_all(model: str, threads: int | None) -> dict[str, api.TempoVLM]:
    """Each back end, with the type of its products where it has several."""
    start_torch(threads)  # before torch is imported, which fixes how threads wait
    import torch

    quick: dict[str, Any] = {"calibrate": False, "progress": False, "device": "cpu", "threads": threads}
    return {
        "torch": api.load(model, **quick),
        "openvino_float32": api.load(model, backend="openvino", dtype=torch.float32, **quick),
        "openvino": api.load(model, backend="openvino", **quick),
    }


def in_turn(models: dict[str, api.TempoVLM], samples: list[Sample]) -> dict[str, list[Answer]]:
    """Answers by back end."""
    answers: dict[str, list[Answer]] = {name: [] for name in models}
    for sample in [*samples[:WARM], *samples]:
        for name, model in models.items():
            answers[name].append(model.answer(sample.image_path, sample.question, style=sample.style))
    return {name: some[WARM:] for name, some in answers.items()}


def summary(answers: list[Answer], texts: list[str]) -> dict[str, Any]:
    """Times in ms, and the number of answers other than `texts`."""
    total_ms = [a.timings_ms["total"] for a in answers]
    p50, p95, p99 = np.percentile(total_ms, [50, 95, 99])
    stages = {name: round(float(np.median([a.timings_ms[name] for a in answers])), 2) for name in STAGES}
    others = sum(a.text != text for a, text in zip(answers, texts, strict=True))
    return {"p50": round(p50, 1), "p95": round(p95, 1), "p99": round(p99, 1), **stages, "other_answers": others}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", help="pocket, or a model folder")
    parser.add_argument("--threads", type=int, help="of an operation; by default those of the product")
    parser.add_argument("--num_samples", type=int, default=80, help="questions")
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, 2], help="busy processes beside")
    parser.add_argument("--json", type=Path, help="file to write; standard output without it")
    args = parser.parse_args()
    models = load_all(args.model, args.threads)
    samples = samples_of(args.num_samples)
    result: dict[str, Any] = {"stamps": {name: one.stamp("synthetic").to_json() for name, one in models.items()}}
    for count in args.neighbours:
        others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
        try:
            answers = in_turn(models, samples)
        finally:
            for one in others:
                one.kill()
        texts = [a.text for a in answers["torch"]]
        result[f"beside_{count}"] = {name: summary(some, texts) for name, some in answers.items()}
    text = json.dumps(result, indent=1)
    if args.json is None:
        print(text)
    else:
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
