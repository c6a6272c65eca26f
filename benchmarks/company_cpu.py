"""Measures deadlines beside busy processes that start and stop together, as multiples of the native median.

One process: it calibrates, takes the median of the native setting on an idle machine, and then asks the same
questions under every budget, alone and beside 2 and 3 busy processes, which work for 5 seconds and rest for 5. For
each of these rows the result has the share on time, the mean score, the median and p99, and how often each setting
ran. It is written after each row; the same command continues a run that was ended. With `--cheapest` every
question under a budget runs the cheapest setting: no policy can be more often on time.

It uses only what the first version has too, so that both can be measured in the same company:

    python benchmarks/company_cpu.py --cpus 0,1 --json new.json
    PYTHONPATH=OLD_CHECKOUT/src python benchmarks/company_cpu.py --cpus 2,3 --json old.json
    python benchmarks/company_cpu.py --busy_calibration 2 --num_samples 400 --json busy.json
    python benchmarks/company_cpu.py --cheapest --json most_on_time.json

The calibration is kept in a folder beside the result, so that runs on other cores have their own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from beside import beside

SHARES = (0.4, 0.6, 0.8, 1.0, 1.5)
"""Budgets, as multiples of the native setting's median."""

SPELL_S = 5.0
"""Seconds for which the busy processes work, and rest, in turn."""

START_S = 1.0
"""Time for the busy processes to start, before their first spell."""

NATIVE_SAMPLES = 40

FIXED = ("model", "backend", "policy", "threads", "num_samples", "busy_calibration", "cpus", "cheapest")
"""Flags that a run which is continued must share; others add rows."""

BUSY = """
import os, sys, time
parent, begins, spell = os.getppid(), float(sys.argv[1]), float(sys.argv[2])
while os.getppid() == parent:
    spells = (time.monotonic() - begins) / spell
    if spells >= 0 and spells % 2 < 1:
        sum(i * i for i in range(10000))
    else:
        time.sleep(spell * (1 - spells % 1))
"""
"""Works in every other spell from `begins` on, by the clock that all processes share, until its parent ends."""


@contextmanager
def busy(count: int, spell_s: float = SPELL_S) -> Iterator[Callable[[], bool]]:
    """Run busy processes on the cores of this one, for ever with a spell of `inf`.

    Yields:
        Says whether they are at work now.
    """
    begins_s = time.monotonic() + START_S
    with beside(count, BUSY, str(begins_s), str(spell_s)):
        time.sleep(START_S if count else 0.0)
        yield lambda: count > 0 and (time.monotonic() - begins_s) / spell_s % 2 < 1


def questions(num_samples: int, data_dir: Path | None) -> tuple[list[Any], Callable[[Any, str], float]]:
    """Questions of all generated data sets in turn, and the function that scores an answer to one."""
    try:
        from tempovlm.data.catalog import load_samples
        from tempovlm.data.registry import GENERATED as NAMES
        from tempovlm.data.scoring import score
    except ImportError:  # the first version's names
        from tempovlm.tasks.base import STYLES as NAMES
        from tempovlm.tasks.base import score
        from tempovlm.tasks.catalog import load_samples
    each = -(-num_samples // len(NAMES))
    columns = [load_samples(name, "val", num_samples=each, data_dir=data_dir) for name in NAMES]
    return [sample for row in zip(*columns, strict=True) for sample in row][:num_samples], score


def ask(vlm: Any, sample: Any, budget_ms: float | None = None, knobs: Any = None) -> Any:
    """Answer a question of a data set, by the policy or at a setting."""
    return vlm.answer(sample.image_path, sample.question, budget_ms, knobs=knobs, style=sample.style)


def row_of(
    vlm: Any,
    samples: Sequence[Any],
    score: Callable[[Any, str], float],
    count: int,
    share: float,
    native_ms: float,
    knobs: Any = None,
) -> dict[str, Any]:
    """Ask all questions under one budget, beside `count` processes that come and go; `knobs` fixes the setting."""
    budget_ms, answers, beside = round(share * native_ms, 2), [], []
    with busy(count) as are_at_work:
        for sample in samples:
            began = are_at_work()
            answers.append(ask(vlm, sample, budget_ms, knobs))
            beside.append(began or are_at_work())
    took_ms = np.array([a.timings_ms["total"] for a in answers])
    late, p50_p99 = took_ms > budget_ms, np.percentile(took_ms, [50, 99])
    return {
        "neighbours": count,
        "budget_ms": budget_ms,
        "budget_ratio": share,
        "num": len(answers),
        "on_time": round(1 - float(late.mean()), 4),
        "right": round(statistics.fmean(score(s, a.text) for s, a in zip(samples, answers, strict=True)), 4),
        "p50_ms": round(float(p50_p99[0]), 2),
        "p99_ms": round(float(p50_p99[1]), 2),
        "num_beside": int(np.sum(beside)),
        "late_beside": int((late & np.array(beside)).sum()),
        "late_by": sorted(round(float(took / budget_ms), 3) for took in took_ms[late]),
        "infeasible": sum(a.budget_feasible is False for a in answers),
        "settings": dict(Counter(str(a.knobs) for a in answers).most_common()),
    }


def measure(args: argparse.Namespace, write: Callable[[dict[str, Any]], None], result: dict[str, Any]) -> None:
    """Add what the result lacks, and write it after each step."""
    from tempovlm import api

    samples, score = questions(args.num_samples, args.data_dir)
    more = {"backend": args.backend} if args.backend else {}
    vlm = api.load(args.model, device="cpu", threads=args.threads, policy=args.policy, progress=False, **more)
    if "native_ms" not in result:
        with busy(args.busy_calibration, float("inf")):
            vlm.calibrate(force=True)
        some = (samples * NATIVE_SAMPLES)[:NATIVE_SAMPLES]
        took_ms = [ask(vlm, sample).timings_ms["total"] for sample in some]
        result["native_ms"] = round(statistics.median(took_ms), 2)
        result["stamp"] = vlm.stamp("synthetic").to_json()
        write(result)
    vlm.calibrate()
    done = {(row["neighbours"], row["budget_ratio"]) for row in result["rows"]}
    for count in args.neighbours:
        for share in args.shares:
            if (count, share) in done:
                continue
            knobs = vlm.space.cheapest if args.cheapest else None
            row = row_of(vlm, samples, score, count, share, result["native_ms"], knobs)
            result["rows"].append(row)
            write(result)
            print(
                f"beside {count}, {share:g}: {row['on_time']:.1%} on time, {row['right']:.1%} right",
                file=sys.stderr,
            )


def read_flags() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", help="pocket, or a model folder")
    parser.add_argument("--backend", help="back end of the stages; by default that of the product")
    parser.add_argument("--policy", default="auto", help="what chooses the setting")
    parser.add_argument("--cheapest", action="store_true", help="the cheapest setting in place of the policy's")
    parser.add_argument("--threads", type=int, help="of an operation; by default those of the product")
    parser.add_argument("--num_samples", type=int, default=400, help="questions a row")
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 2, 3], help="busy processes beside")
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES), help="budgets over the median")
    parser.add_argument("--busy_calibration", type=int, default=0, help="busy processes beside the calibration")
    parser.add_argument("--cpus", help="cores for this and the busy processes, such as 0,1; by default all")
    parser.add_argument("--data_dir", type=Path, help="folder of the data; by default that of the product")
    parser.add_argument("--json", type=Path, required=True, help="file to write, or to continue")
    args = parser.parse_args()
    if args.cpus:
        try:
            os.sched_setaffinity(0, {int(cpu) for cpu in args.cpus.split(",")})
        except (ValueError, OSError) as error:
            parser.error(f"--cpus {args.cpus}: {error}; give numbers of cores such as 0,1")
    return args


def main() -> None:
    """Measure and write."""
    args = read_flags()
    os.environ.setdefault("TEMPOVLM_CACHE_DIR", str(args.json.with_suffix(".cache").absolute()))
    flags = {name: getattr(args, name) for name in FIXED}
    result: dict[str, Any] = {"flags": flags, "rows": []}
    if args.json.is_file():
        result = json.loads(args.json.read_text(encoding="utf-8"))
        if {"cheapest": False} | result["flags"] != flags:  # files of before the flag lack it
            sys.exit(f"{args.json}: made with other flags ({result['flags']}); give another file, or remove it")

    from tempovlm.core.paths import write_whole

    measure(args, lambda record: write_whole(args.json, json.dumps(record, indent=1) + "\n"), result)


if __name__ == "__main__":
    main()
