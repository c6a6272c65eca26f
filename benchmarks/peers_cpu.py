"""Times the stages of answers on a CPU beside other runtimes on the same weights, alone and beside busy processes.

The peers (extra `peers`) are OpenVINO, ONNX Runtime and llama.cpp; the weights are converted at run time. Rows are
prompts of several lengths, tokens, pictures of several numbers of crops, and whole answers at the native setting,
in which a peer runs all stages after our preparation of the picture. Contenders take turns in one process; but
llama.cpp has its own, which are stopped while others run. Busy processes start and stop together every second.

First `--accuracy` of the model card's validation questions are answered with each type of products: a type
counts whose accuracy is within 0.2 points of torch's in float32. Beside busy processes only the fastest type that
counts is timed, for each number of threads. Answers are kept beside the result; `--only_accuracy` goes on with
them, in several processes at once if each has its shard, and puts the accuracies into the result.

    pip install 'tempovlm[peers]'
    python benchmarks/peers_cpu.py --json benchmarks/results/peers_cpu.json
    python benchmarks/peers_cpu.py --backends torch kernels --peers openvino --quick
    python benchmarks/peers_cpu.py --table benchmarks/results/peers_cpu.json
    python benchmarks/peers_cpu.py --only_accuracy --accuracy 7244 --json benchmarks/results/peers_cpu.json
    python benchmarks/peers_cpu.py --only_accuracy --accuracy 7244 --json OUT --threads 1 --shard 0/2 &
    python benchmarks/peers_cpu.py --only_accuracy --accuracy 7244 --json OUT --threads 1 --shard 1/2
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import peers_cpu_llama as llama
from accuracy_cpu import shard_of
from beside import beside
from output import write_json
from peers_cpu_stages import Contender, Work, llama_job, our_job, peer_job, take_turns, works_of
from tempovlm import api
from tempovlm.core.errors import UserError
from tempovlm.core.paths import read_json
from tempovlm.core.plan import Plan
from tempovlm.core.stamp import __version__
from tempovlm.data.catalog import load_mixed
from tempovlm.data.registry import GENERATED
from tempovlm.data.sample import Sample
from tempovlm.engine.threads import start_torch

if TYPE_CHECKING:
    from peers_cpu_accuracy import Reader

MODULES = {
    "openvino": ("openvino",),
    "onnxruntime": ("onnxruntime", "onnx"),
    llama.NAME: (llama.PACKAGE, "gguf"),
}
"""Peer → the modules that it needs."""

CLASSES = {"openvino": ("peers_cpu_openvino", "OpenVino"), "onnxruntime": ("peers_cpu_onnx", "OnnxRuntime")}
"""Peer that shares the process → module here, and class."""

TITLES = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime, not spinning"}
TYPES = ("f32", "bf16", "f16")
RESULT = {"rows": {"name", "company", "who", "threads", "p50", "p99"}, "accuracy": {"who", "counts"}}
"""Lists of a result, with the fields that the table reads."""

README_ROWS = {
    "prefill_289_k8_b16": "prompt of 289 tokens, k8/b16",
    "prefill_700_k8_b16": "prompt of 700 tokens, k8/b16",
    "decode_300_k8_b16": "a token after 300, k8/b16",
    "vision_13": "vision transformer, 13 crops",
    "answer": "whole answer, high/k8/b16",
}
COMPANY = ("alone", "beside one", "beside two")

BUSY = """
import time
while True:
    if time.time() % 2 < 1: sum(i * i for i in range(2000))
    else: time.sleep(0.002)
"""
"""A process that is busy in every other second, the same for all such processes."""

TIMED_MS, QUICK_MS = 360e3, 15e3
ROUNDS = 200


def missing(peers: Sequence[str]) -> str | None:
    """Return a message if a peer's package is not installed."""
    for peer in peers:
        lacking = [name for name in MODULES[peer] if find_spec(name) is None]
        if lacking:
            return f"--peers {peer}: {lacking[0]} is not installed; pip install 'tempovlm[peers]', or leave it out"
    return None


def load_ours(model: str, backends: Sequence[str], threads: Sequence[int]) -> dict[tuple[str, int], api.TempoVLM]:
    """Load each back end, `NAME` or `NAME:float32`, with each number of threads."""
    start_torch(max(threads))  # before torch is imported, which fixes how threads wait
    import torch

    quick: dict[str, Any] = {"calibrate": False, "progress": False, "device": "cpu"}
    loaded = {}
    for name in backends:
        backend, _, kind = name.partition(":")
        dtype = None if not kind else getattr(torch, kind, None)
        if kind and not isinstance(dtype, torch.dtype):
            raise UserError(f"--backends {name}: {kind} is no type of torch; give float32, or the name alone")
        given: dict[str, Any] = {"backend": backend, "dtype": dtype}
        for count in threads:
            loaded[name, count] = api.load(model, threads=count, **given, **quick)
    return loaded


def our_contenders(ours: dict[tuple[str, int], api.TempoVLM], sample: Sample) -> list[Contender]:
    """Ours, a contender for each back end and number of threads."""
    found = []
    for (name, threads), vlm in ours.items():
        stages = getattr(vlm.engine.runner, "stages", None)
        precision = {"float32": "f32", "bfloat16": "bf16"}[getattr(stages, "precision", None) or "float32"]
        backend = name.partition(":")[0]
        make = partial(our_job, vlm, sample)
        found.append(Contender(f"ours_{backend}", "tempovlm", precision, threads, make))
    return found


def peer_contenders(
    args: argparse.Namespace, vlm: api.TempoVLM, sample: Sample
) -> Iterator[tuple[Contender, Any]]:
    """The peers that share the process, each with its runtime."""
    for name in (name for name in args.peers if name in CLASSES):
        module, kind = CLASSES[name]
        make = getattr(importlib.import_module(module), kind)
        for precision in (one for one in make.precisions if one in args.types and make.can_run(one)):
            for count in args.threads:
                peer = make(vlm.engine.runner.model, precision, count)
                yield (
                    Contender(name, MODULES[name][0], precision, count, partial(peer_job, peer, vlm, sample)),
                    peer,
                )


def llama_contenders(
    args: argparse.Namespace, vlm: api.TempoVLM, works: Sequence[Work], folder: Path, stack: contextlib.ExitStack
) -> list[Contender]:
    """llama.cpp, with several threads both as they sleep and as they spin while they wait."""
    found = []
    files: dict[str, dict[Plan, Path]] = {one: {} for one in llama.PRECISIONS if one in args.types}
    for precision, paths in files.items():
        for plan in {work.plan for work in works if work.plan is not None}:
            paths[plan] = folder / f"b{len(plan.steps)}_{precision}.gguf"
            llama.write_gguf(paths[plan], vlm.engine.runner.model, plan, precision)
    for count, is_spinning in [(count, spins) for count in args.threads for spins in (False, True)]:
        if is_spinning and count == 1:
            continue
        process = llama.Llama(count, is_spinning=is_spinning)
        stack.callback(process.close)
        for precision, paths in files.items():
            make = partial(llama_job, process, paths)
            found.append(Contender(llama.NAME, llama.PACKAGE, precision, count, make, is_spinning))
    return found


def measure(
    contenders: Sequence[Contender], works: Sequence[Work], counting: set[str], limit_ms: float, repeats: int
) -> list[dict[str, Any]]:
    """Time all rows in each company; what a row needs is made for it and freed after it."""
    rows: list[dict[str, Any]] = []
    total = sum(work.weight for work in works) * len(COMPANY)
    for work in works:
        made = [(one, one.make(work)) for one in contenders]
        jobs = {one: job for one, job in made if job is not None}
        for company, words in enumerate(COMPANY):
            those = fastest_types([*jobs], rows, work.name, counting) if company else [*jobs]
            with beside(company, BUSY):
                own_ms = limit_ms * work.weight / total
                times_ms = take_turns([jobs[one] for one in those], own_ms, repeats)
            rows += [row_of(work.name, company, *pair) for pair in zip(those, times_ms, strict=True)]
            print(f"{work.name}, {words}", file=sys.stderr, flush=True)
    return rows


def fastest_types(
    contenders: Sequence[Contender], rows: Sequence[dict[str, Any]], name: str, counting: set[str]
) -> list[Contender]:
    """Of contenders that differ in the type of products only, the fastest when alone of those that count."""
    alone = {
        (row["who"], row["threads"]): row["p50"] for row in rows if row["name"] == name and not row["company"]
    }
    groups: dict[Any, list[Contender]] = {}
    for one in contenders:
        if one.package == "tempovlm":
            groups[one.label, one.threads] = [one]
        elif f"{one.who}_{one.precision}" in counting:
            groups.setdefault((one.who, one.threads, one.is_spinning), []).append(one)
    return [min(some, key=lambda one: alone[one.label, one.threads]) for some in groups.values()]


def row_of(name: str, company: int, contender: Contender, times_ms: list[float]) -> dict[str, Any]:
    """One result."""
    quantiles = zip(("p50", "p95", "p99"), np.percentile(times_ms, (50, 95, 99)), strict=True)
    known = {"name": name, "company": company, "who": contender.label, "threads": contender.threads}
    return known | {key: round(float(value), 3) for key, value in quantiles} | {"times": len(times_ms)}


def best(rows: Sequence[dict[str, Any]], counting: set[str], who: str) -> dict[str, Any] | None:
    """Of the rows of one work and company the best by a contender: by the median alone, by p99 in company."""
    own = [row for row in rows if who == who_of(row) and row["who"].removesuffix("_spinning") in counting]
    return min(own, key=lambda row: row["p99" if row["company"] else "p50"], default=None)


def who_of(row: dict[str, Any]) -> str:
    """The contender of a row, without its type of products."""
    return str(row["who"]).removesuffix("_spinning").rpartition("_")[0]


def table(record: dict[str, Any]) -> str:
    """Return a table in Markdown: for each contender its best variant, by the median alone, by p99 in company."""
    unfit = {row["who"] for row in record["accuracy"] if not (row["counts"] or row["who"].startswith("ours_"))}
    counting = {row["who"].removesuffix("_spinning") for row in record["rows"]} - unfit
    contenders = list(dict.fromkeys(map(who_of, record["rows"])))
    titles = [TITLES.get(who, who.replace("ours_", "TempoVLM, ")) for who in contenders]
    lines = [f"| p50 / p99, ms | | {' | '.join(titles)} |", f"|---|---|{'---|' * len(titles)}"]
    for name, title in README_ROWS.items():
        for company, words in enumerate(COMPANY):
            rows = [row for row in record["rows"] if (row["name"], row["company"]) == (name, company)]
            cells = [cell(best(rows, counting, who)) for who in contenders]
            if rows:
                lines.append(f"| {'' if company else title} | {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(row: dict[str, Any] | None) -> str:
    """Median and p99 with threads and type, such as `13.6 / 15.0 (2, bf16)`, and whether threads spin."""
    if row is None:
        return "–"
    name, spinning, _ = row["who"].partition("_spinning")
    kind = name.rpartition("_")[2] + spinning.replace("_", ", ")
    return f"{row['p50']:.3g} / {row['p99']:.3g} ({row['threads']}, {kind})"


def peers_of(contenders: Sequence[Contender]) -> dict[str, dict[str, Any]]:
    """Version, type and numbers of threads of each variant."""
    found: dict[str, dict[str, Any]] = {}
    for one in contenders:
        known = __version__ if one.package == "tempovlm" else version(one.package)
        own = {"version": known, "precision": one.precision, "is_spinning": one.is_spinning}
        found.setdefault(one.label, own | {"threads": []})["threads"].append(one.threads)
    return found


@contextlib.contextmanager
def readers_of(
    args: argparse.Namespace, ours: dict[str, api.TempoVLM], peers: dict[str, Any], reference: api.TempoVLM
) -> Iterator[dict[str, Reader]]:
    """Make all ways to answer questions but the reference, by label."""
    from peers_cpu_accuracy import REFERENCE, llama_reader, our_reader, peer_reader

    run, plan = reference.engine.runner, reference.engine.plan(reference.space.native)
    readers = {label: our_reader(vlm.engine.runner, plan) for label, vlm in ours.items() if label != REFERENCE}
    readers |= {label: peer_reader(peer, run, plan) for label, peer in peers.items()}
    with contextlib.ExitStack() as stack:
        if llama.NAME in args.peers:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            process = llama.Llama(max(args.threads))
            stack.callback(process.close)
            for precision in (one for one in llama.PRECISIONS if one in args.types):
                readers[f"{llama.NAME}_{precision}"] = llama_reader(process, precision, run, plan, folder)
        yield readers


def accuracies(
    args: argparse.Namespace, ours: dict[str, api.TempoVLM], peers: dict[str, Any], reference: api.TempoVLM
) -> list[dict[str, Any]]:
    """Answer the questions that have no kept answer, and return a row for each way to answer."""
    from peers_cpu_accuracy import REFERENCE, Kept, answer, pictures_of

    stamp, model = reference.stamp("synthetic"), api.model_folder(args.model)
    pictures = pictures_of(model, min(args.accuracy, 8) if args.quick else args.accuracy)
    first, step = args.shard
    with contextlib.ExitStack() as stack:
        readers = stack.enter_context(readers_of(args, ours, peers, reference))
        folder = args.answers or (args.json and args.json.with_suffix(".answers"))
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        versions = dict.fromkeys(ours, f"{__version__} {stamp.commit}") | {REFERENCE: stamp.torch}
        for label in readers.keys() - ours.keys():
            versions[label] = version(MODULES[label.rpartition("_")[0]][0])
        make = partial(Kept, folder, {"weights": stamp.weights, "hardware": stamp.hardware}, versions)
        answer(reference, model, readers, pictures[first::step], make())
        kept = make()  # with what others answered meanwhile
        return [row for who in readers if (row := kept.row(who, set(pictures))) is not None]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything, or only answer questions."""
    ours = load_ours(args.model, args.backends, [max(args.threads)] if args.only_accuracy else args.threads)
    import torch

    plain: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "backend": "torch", "progress": False}
    reference = api.load(args.model, calibrate=False, threads=max(args.threads), **plain)
    (sample,), works = load_mixed(GENERATED, 1), works_of(reference)
    contenders = our_contenders(ours, sample)
    answering = {one.label: vlm for one, vlm in zip(contenders, ours.values(), strict=True)}
    peers = {}
    for one, peer in peer_contenders(args, reference, sample):
        contenders.append(one)
        if one.threads == max(args.threads):
            peers[one.label] = peer
    accuracy = accuracies(args, answering, peers, reference) if args.accuracy else []
    stamp = reference.stamp("synthetic").to_json()
    if args.only_accuracy:
        return with_accuracy(args.json, stamp, accuracy)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        if llama.NAME in args.peers:
            contenders += llama_contenders(args, reference, works, Path(name), stack)
        unfit = {row["who"] for row in accuracy if not row["counts"]}
        counting = {f"{one.who}_{one.precision}" for one in contenders} - unfit
        limit_ms = QUICK_MS if args.quick else args.minutes * 60e3
        rows = measure(contenders, works, counting, limit_ms, 2 if args.quick else ROUNDS)
    return {"stamp": stamp, "peers": peers_of(contenders), "rows": rows, "accuracy": accuracy}


def with_accuracy(path: Path, stamp: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the result in a file with these accuracies in place of earlier ones; without a file nothing else.

    Raises:
        UserError: the file is no result, or of other weights.
    """
    record = {"stamp": stamp, "peers": {}, "rows": [], "accuracy": []}
    if path.exists():
        record = read_result(path)
    if record["stamp"]["weights"] != stamp["weights"]:
        raise UserError(f"{path}: of other weights than --model; give another file")
    known = {row["who"] for row in rows}
    return record | {"accuracy": [*(row for row in record["accuracy"] if row["who"] not in known), *rows]}


def read_result(path: Path) -> dict[str, Any]:
    """Return a result of this benchmark.

    Raises:
        UserError: the file is none.
    """
    remedy = "measure it with --json"
    record = read_json(path, remedy)
    for name, fields in RESULT.items():
        rows = record.get(name) if isinstance(record, dict) else None
        if not (isinstance(rows, list) and all(isinstance(row, dict) and fields <= row.keys() for row in rows)):
            raise UserError(
                f"{path}: no result of peers_cpu.py: no {name} with {', '.join(sorted(fields))}; {remedy}"
            )
    return dict(record)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", help="pocket, or a model folder")
    parser.add_argument(
        "--backends", nargs="+", default=["kernels", "kernels:float32"], help="ours: NAME, or NAME:float32"
    )
    parser.add_argument("--peers", nargs="*", choices=list(MODULES), default=list(MODULES))
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES), help="of the peers' products")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of ours and of each peer")
    parser.add_argument(
        "--accuracy", type=int, default=300, metavar="N", help="questions; 0 for none, 7244 for figures"
    )
    parser.add_argument("--only_accuracy", action="store_true", help="time nothing; put accuracies into --json")
    parser.add_argument("--shard", type=shard_of, default=(0, 1), metavar="I/N", help="of the pictures, to answer")
    parser.add_argument("--answers", type=Path, help="folder of kept answers; by default --json, as .answers")
    parser.add_argument("--minutes", type=float, default=TIMED_MS / 60e3, help="for timing; more for p99")
    parser.add_argument("--quick", action="store_true", help="8 questions and 2 turns: not for figures")
    parser.add_argument("--json", type=Path, help="file to write; standard output without it")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print a result's table and measure nothing")
    return parser


def main() -> None:
    """Measure and write, or print a table."""
    parser = make_parser()
    args = parser.parse_args()
    for flag, least in (("accuracy", 0), ("minutes", 0.0)):
        if getattr(args, flag) < least:
            parser.error(f"--{flag} {getattr(args, flag)}: must be at least {least:g}")
    if args.only_accuracy and not (args.json and args.accuracy):
        parser.error("--only_accuracy: needs --json, the result that gets the accuracies, and --accuracy above 0")
    if args.shard != (0, 1) and not args.only_accuracy:
        parser.error("--shard: only with --only_accuracy")
    try:
        if args.table is not None:
            print(table(read_result(args.table)))
            return
        fault = missing(args.peers)
        if fault is not None:
            parser.error(fault)
        write_json(run(args), args.json)
    except UserError as error:
        parser.error(error.flagged)


if __name__ == "__main__":
    main()
