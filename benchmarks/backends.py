"""Times the stages of answers by a CPU's back ends, in turn on the same pictures, alone and beside busy processes.

Every back end answers at the native setting with the same number of threads; `--before FOLDER` adds the package
of another checkout, which answers in a process of its own while all others wait. The result has medians of the
stages; the median, p95 and p99 of whole answers; and how many answers differ from those of torch in float32.

Prompts and tokens are also timed, alone, on decoders of other sizes, `EXPERTS x WIDTH`; their weights are random,
but for the model's own size.

    python benchmarks/backends.py --json benchmarks/results/backends_cpu.json
    python benchmarks/backends.py --neighbours --decoders 32x24 --before OLD_CHECKOUT
    python benchmarks/backends.py --table benchmarks/results/backends_cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import backends_turns
from backends_turns import ROWS, jobs_of, load
from beside import beside
from deadlines import samples_of
from output import write_json
from peers_cpu_stages import take_turns
from tempovlm import api
from tempovlm.core.errors import UserError
from tempovlm.core.paths import read_json
from tempovlm.core.request import STAGES
from tempovlm.data.sample import Sample
from tempovlm.engine.threads import start_torch

BUSY = "while True: sum(i * i for i in range(10000))"
WARM = 4
DECODERS, BACKENDS = ("16x48", "32x24", "32x16"), ("torch", "kernels")
ROW_MS, REPEATS = 3e3, 100
"""Time for a row of a decoder, and the most turns."""

TITLES = {"before": "before", "torch": "torch", "kernels_float32": "kernels, float32", "kernels": "kernels"}

Times = dict[str, float]
Ask = Callable[[Sample], tuple[str, Times]]


def load_all(model: str, threads: int | None) -> dict[str, api.TempoVLM]:
    """Each back end, with the type of its products where it has several."""
    start_torch(threads)  # before torch is imported, which fixes how threads wait
    import torch

    return {
        "torch": load(model, threads, backend="torch"),
        "kernels_float32": load(model, threads, backend="kernels", dtype=torch.float32),
        "kernels": load(model, threads, backend="kernels"),
    }


def asked_here(model: api.TempoVLM) -> Ask:
    """Answers of a loaded model: text, and times in ms."""

    def ask(sample: Sample) -> tuple[str, Times]:
        answer = model.answer(sample.image_path, sample.question, style=sample.style)
        return answer.text, dict(answer.timings_ms)

    return ask


class Before:
    """The package of another checkout, in a process of its own."""

    def __init__(self, folder: Path, model: str, threads: int | None) -> None:
        if not (folder / "src" / "tempovlm" / "__init__.py").is_file():
            raise UserError(f"--before {folder}: no src/tempovlm there; give the folder of a checkout")
        self._folder = folder
        self._child = subprocess.Popen(
            [sys.executable, backends_turns.__file__, model, str(threads or 0)],
            env={**os.environ, "PYTHONPATH": str(folder / "src")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *words: str) -> Any:
        """Send a request of `backends_turns`, and return its result."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps(words) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass
        line = self._child.stdout.readline()
        if not line:
            raise UserError(f"--before {self._folder}: its package failed, as told above; give another checkout")
        return json.loads(line)

    def ask(self, sample: Sample) -> tuple[str, Times]:
        """Answer a question: text, and times in ms."""
        text, timings_ms = self("answer", str(sample.image_path), sample.question, sample.style)
        return text, timings_ms

    def close(self) -> None:
        """End the process."""
        self._child.kill()
        self._child.wait()


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
    stages = {name: round(float(np.median([one.get(name, 0.0) for one in times])), 2) for name in STAGES}
    others = sum(text != wanted for (text, _), wanted in zip(answers, texts, strict=True))
    return {**quantiles([one["total"] for one in times], 1), **stages, "other_answers": others}


def quantiles(times_ms: Sequence[float], digits: int) -> dict[str, float]:
    """Median, p95 and p99."""
    values = np.percentile(times_ms, (50, 95, 99))
    return {name: round(float(value), digits) for name, value in zip(("p50", "p95", "p99"), values, strict=True)}


def decoder_folder(model: Path, size: str, folder: Path) -> Path:
    """Return the folder of a model with another size of decoder: random and written, or the model itself."""
    from tempovlm.model.weights import read_config, write_random

    config = read_config(model)
    experts, width = map(int, size.split("x"))
    if (experts, width) == (config.num_experts, config.expert_width):
        return model
    config = replace(config, num_experts=experts, expert_width=width)
    write_random(folder / size, config, tokenizer=model)
    return folder / size


def decoder_rows(model: Path, threads: int | None, before: Before | None) -> dict[str, Any]:
    """Times of each row of one decoder, by back end."""
    jobs = {name: jobs_of(load(model, threads, backend=name)) for name in BACKENDS}
    if before is not None:
        before("decoder", str(model))
        jobs["before"] = {row: partial(before, row) for row in ROWS}
    found = {}
    for row in ROWS:
        times_ms = take_turns([some[row] for some in jobs.values()], ROW_MS, REPEATS)
        found[row] = {
            name: quantiles(some, 3) | {"times": len(some)} for name, some in zip(jobs, times_ms, strict=True)
        }
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything."""
    before = None if args.before is None else Before(args.before, args.model, args.threads)
    try:
        models = load_all(args.model, args.threads)
        asks = {name: asked_here(one) for name, one in models.items()}
        result: dict[str, Any] = {
            "stamps": {name: one.stamp("synthetic").to_json() for name, one in models.items()}
        }
        if before is not None:
            asks["before"] = before.ask
            result["stamps"]["before"] = before("stamp")
        samples = samples_of(args.num_samples)
        for count in args.neighbours:
            with beside(count, BUSY):
                answers = in_turn(asks, samples)
            texts = [text for text, _ in answers["torch"]]
            result[f"beside_{count}"] = {name: summary(some, texts) for name, some in answers.items()}
        with tempfile.TemporaryDirectory() as scratch:
            own = api.model_folder(args.model)
            folders = {size: decoder_folder(own, size, Path(scratch)) for size in args.decoders}
            result["decoders"] = {size: decoder_rows(path, args.threads, before) for size, path in folders.items()}
        return result
    finally:
        if before is not None:
            before.close()


def table(path: Path) -> str:
    """Return the tables of a result in Markdown: medians and p99 of answers, and medians of other decoders.

    Raises:
        UserError: the file is no result of this benchmark.
    """
    remedy = "measure it with --json"
    record = read_json(path, remedy)
    if not (isinstance(record, dict) and isinstance(record.get("stamps"), dict)):
        raise UserError(f"{path}: no result of backends.py, as field stamps is missing; {remedy}")
    beside = {name.partition("_")[2]: rows for name, rows in record.items() if name.startswith("beside_")}
    answers = {
        "alone" if count == "0" else f"beside {count}": {
            who: f"{row['p50']:.0f} / {row['p99']:.0f}" for who, row in rows.items()
        }
        for count, rows in beside.items()
    }
    decoders = {
        f"{size.replace('x', ' × ')}: {ROWS[row]}": {who: f"{one['p50']:.3g}" for who, one in found.items()}
        for size, rows in record.get("decoders", {}).items()
        for row, found in rows.items()
    }
    return "\n\n".join(markdown(*one) for one in (("answers", answers), ("decoder", decoders)) if one[1])


def markdown(title: str, rows: dict[str, dict[str, str]]) -> str:
    """Return a table of cells by row and back end."""
    whos = [who for who in TITLES if any(who in cells for cells in rows.values())]
    lines = [f"| {title}, ms | {' | '.join(TITLES[who] for who in whos)} |", f"|---|{'---|' * len(whos)}"]
    return "\n".join(
        [
            *lines,
            *(f"| {name} | {' | '.join(cells.get(who, '–') for who in whos)} |" for name, cells in rows.items()),
        ]
    )


def size_of(text: str) -> str:
    """Check `EXPERTSxWIDTH`."""
    experts, _, width = text.partition("x")
    if not (experts.isdecimal() and width.isdecimal() and int(experts) and int(width)):
        raise argparse.ArgumentTypeError(f"{text}: must be the number of experts and their width, such as 32x24")
    return f"{int(experts)}x{int(width)}"


def main() -> None:
    """Measure and write, or print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", help="pocket, or a model folder")
    parser.add_argument("--threads", type=int, help="of an operation; by default those of the product")
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="checkout whose package answers too")
    parser.add_argument("--num_samples", type=int, default=80, help="questions")
    parser.add_argument(
        "--neighbours", type=int, nargs="*", default=[0, 1, 2], help="busy processes beside; none for no answers"
    )
    parser.add_argument(
        "--decoders",
        type=size_of,
        nargs="*",
        default=list(DECODERS),
        metavar="EXPERTSxWIDTH",
        help="other sizes, none for none; 75 seconds for the three",
    )
    parser.add_argument("--json", type=Path, help="file to write; standard output without it")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print a result's tables and measure nothing")
    args = parser.parse_args()
    try:
        if args.table is not None:
            print(table(args.table))
        else:
            write_json(run(args), args.json)
    except UserError as error:
        parser.error(error.flagged)


if __name__ == "__main__":
    main()
