"""Exp 8: a data set answered within budgets by a loaded model and its controller, sample by sample, resumable.

It measures and summarises with `tempovlm bench`, adds the experiment's own fields to the file,
keeps finished records on disk, and prints the trade-off. The model is only used through `answer`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from tempovlm.core.errors import UserError
from tempovlm.core.files import make_folder
from tempovlm.core.knobs import KNOBS, KnobSpace
from tempovlm.core.machine import BUSY_CORES, busy_cores, machine_lock
from tempovlm.core.paths import write_whole
from tempovlm.core.progress import progress_bar
from tempovlm.core.request import Answer
from tempovlm.core.stamp import Stamp
from tempovlm.data.catalog import bed_of, load_mixed
from tempovlm.data.digest import merged, question_digests, refuse_others
from tempovlm.data.sample import Sample
from tempovlm.data.scoring import check_scorable
from tempovlm.lab import statistics
from tempovlm.lab.bench import bench
from tempovlm.lab.bench.summary import Record, rounded, summarise
from tempovlm.lab.core_exp.failures import ANEW, tell_failures
from tempovlm.lab.options import AdaptiveFlags

_log = logging.getLogger("tempovlm")

SCHEMA = "tempovlm.adaptive_inference/2"

_IN_DATA = ("question", "references", "picture")
"""Fields of a record that are not written: they are the data's, and the same at each budget."""


class Loaded(bench.Model, Protocol):
    """A model with a stamp and a profile."""

    @property
    def profile(self) -> Any:
        """The latency profile; None before calibration."""

    def stamp(self, data_source: str | None = None) -> Stamp:
        """Return the stamp of its figures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(AdaptiveFlags):
    """Questions and budgets of one run."""

    def conditions(self, stamp: Stamp) -> dict[str, Any]:
        """Conditions that all records of a file share; the number of questions may grow."""
        fields = {name: value for name, value in asdict(self).items() if name not in ("num_samples", "data_dir")}
        same = {name: getattr(stamp, name) for name in ("hardware", "device", "weights", "knob_space")}
        return json.loads(json.dumps({**fields, **same}))


@dataclass(frozen=True, slots=True)
class _Asked:
    """The model with one more option in each request."""

    model: Loaded
    on_deadline: str

    @property
    def space(self) -> KnobSpace:
        return self.model.space

    def answer(self, *about: Any, **options: Any) -> Answer:
        return self.model.answer(*about, **{"on_deadline": self.on_deadline, **options})


def default_path(datasets: Sequence[str], budgets_ms: Sequence[float]) -> Path:
    """Return `results/adaptive_inference/{dataset}_{budget}.json`; several of either are joined."""
    budgets = "-".join(f"{budget_ms:g}" for budget_ms in budgets_ms)
    return Path("results/adaptive_inference") / f"{'+'.join(datasets)}_{budgets}.json"


def run(model: Loaded, plan: Plan, path: Path) -> dict[str, Any]:
    """Answer the remaining questions, with a bar and the time left, and write the result file.

    Raises:
        UserError: the data or the output cannot be used.
    """
    samples = load_mixed(plan.datasets, plan.num_samples, data_dir=plan.data_dir, seed=plan.seed)
    check_scorable(samples)
    stamp = model.stamp(", ".join(sorted({sample.data_source for sample in samples})))
    make_folder(path.parent, "--output_path")
    kept = path.with_name(f".{path.name}.records.jsonl")
    steps = bench.BenchPlan(
        budgets_ms=plan.budgets_ms,
        fixed=None,
        slower_existed=bench.slower_than(model.space, model.profile),
        seed=plan.seed,
        max_new_tokens=plan.max_new_tokens,
    )
    with machine_lock(), progress_bar("answering questions") as advance:
        # Read only when no other process measures, which may have written to the same file.
        records = _resume(kept, plan.conditions(stamp), samples)
        asked = {(r.dataset, r.question_id) for r in records}
        left = [s for s in samples if (s.dataset, str(s.question_id)) not in asked]
        busy = busy_cores()
        with kept.open("a", encoding="utf-8") as file:
            for done, sample in enumerate(left):
                advance(len(samples) - len(left) + done, len(samples))
                rows = list(bench.measure(_Asked(model, plan.on_deadline), [sample], steps))
                # A question's rows go out in one write, so that a kill leaves all of them or a torn last line.
                file.write("".join(json.dumps(row.to_json()) + "\n" for row in rows))
                file.flush()
                records += rows
        wanted = {(s.dataset, str(s.question_id)) for s in samples}
        records = [r for r in records if (r.dataset, r.question_id) in wanted]
        failed = bench.errors_of(records)
        if len(failed) == len(records):
            kept.unlink(missing_ok=True)
        tell_failures(failed, len(records), "answers", ANEW)
        records = bench.score_together(records, samples)
        result = _result(model, plan, records, stamp)
        bed = bed_of(plan.datasets, plan.data_dir)
        result["bed"] = None if bed is None else bed.to_json()
        result["busy"] = None if busy is None else busy >= BUSY_CORES
        write_whole(path, as_text(rounded(result)))
        kept.unlink(missing_ok=True)
    return result


def _resume(path: Path, conditions: Mapping[str, Any], samples: Sequence[Sample]) -> list[Record]:
    """Return the records of the finished questions of an interrupted run; makes the file if there is none.

    Questions that failed are left out, so that they are asked again.

    Raises:
        UserError: that run was another one, or about other questions of the same ids.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    records: list[Record] = []
    if lines:
        before = _field(lines[0], "conditions")
        if before is None or before != conditions:
            differs = [name for name in conditions if before is None or before.get(name) != conditions[name]]
            raise UserError(
                f"{path}: left by an interrupted run with another {', '.join(differs)}: repeat that command to "
                "finish it, remove the file, or give another --output_path"
            )
        for line in lines[1:]:
            try:
                records.append(Record(**json.loads(line)))
            except (ValueError, TypeError):
                break
    counts: dict[tuple[str, str], int] = {}
    for record in records:
        key = (record.dataset, record.question_id)
        counts[key] = counts.get(key, 0) + 1
    failed = {(r.dataset, r.question_id) for r in records if r.error is not None}
    whole = [
        r
        for r in records
        if counts[r.dataset, r.question_id] == len(conditions["budgets_ms"])
        and (r.dataset, r.question_id) not in failed
    ]
    questions = _questions(samples)
    known, kept = (
        _field(lines[0], "questions") if lines else None,
        {_name(r.dataset, r.question_id) for r in whole},
    )
    if known is None and whole:
        _log.warning("%s: written by an earlier version, which did not record the questions; used unchecked", path)
    refuse_others({name: digest for name, digest in (known or {}).items() if name in kept}, questions, str(path))
    first = {"conditions": dict(conditions), "questions": merged(known or {}, questions)}
    write_whole(path, "\n".join([json.dumps(first), *(json.dumps(r.to_json()) for r in whole)]) + "\n")
    return whole


def _name(dataset: str, question_id: str) -> str:
    return f"{dataset} {question_id}"


def _questions(samples: Sequence[Sample]) -> dict[str, str]:
    """Return digests of questions of several data sets, whose ids may be the same."""
    found: dict[str, str] = {}
    for dataset in dict.fromkeys(sample.dataset for sample in samples):
        own = question_digests(sample for sample in samples if sample.dataset == dataset)
        found |= {_name(dataset, name): digest for name, digest in own.items()}
    return found


def _field(line: str, name: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)[name]
    except (ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def _result(model: Loaded, plan: Plan, records: Sequence[Record], stamp: Stamp) -> dict[str, Any]:
    summary = summarise(records)
    for row in summary["budgets"]:
        row.update(_more([r for r in records if r.budget_ms == row["budget_ms"]]))
    return {
        "schema": SCHEMA,
        "budgets": summary["budgets"],
        "num_failed": summary["num_failed"],
        "failures": summary["failures"],
        "dataset": list(plan.datasets),
        "controller": plan.controller,
        "on_deadline": plan.on_deadline,
        "max_new_tokens": plan.max_new_tokens,
        "seed": plan.seed,
        "model": stamp.model,
        "device": stamp.device,
        "data_source": stamp.data_source,
        "knob_space": {name: list(legal) for name, legal in model.space.axes.items()},
        "stamp": stamp.to_json(),
        "samples": as_columns(records),
    }


def as_columns(records: Sequence[Record]) -> dict[str, Any]:
    """Return all records in columns; fields with the same value in all of them are stored once.

    Returns:
        `same`, those fields; `columns`, the names of the others, times as `timings_ms.STAGE`; and `rows`, a
        list of their values for each record, None for a stage without a time.
    """
    flat = []
    for record in records:
        fields = record.to_json()
        times = {f"timings_ms.{stage}": time_ms for stage, time_ms in fields.pop("timings_ms").items()}
        flat.append({name: value for name, value in fields.items() if name not in _IN_DATA} | times)
    names = list(dict.fromkeys(name for fields in flat for name in fields))
    same = {name: flat[0].get(name) for name in names if len({fields.get(name) for fields in flat}) == 1}
    columns = [name for name in names if name not in same]
    return {
        "same": same,
        "columns": columns,
        "rows": [[fields.get(name) for name in columns] for fields in flat],
    }


def as_text(result: Mapping[str, Any]) -> str:
    """Return the file's text: everything indented except the rows of the samples, which come last, a line each."""
    samples, others = result["samples"], {name: value for name, value in result.items() if name != "samples"}
    rows = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in samples["rows"]]
    text = json.dumps({**others, "samples": {**samples, "rows": []}}, indent=1, ensure_ascii=False)
    return text.removesuffix("[]\n }\n}") + "[\n" + ",\n".join(rows) + "\n  ]\n }\n}\n"


def _more(records: Sequence[Record]) -> dict[str, Any]:
    """Return, for one budget, mean latency, shares of each knob's values, and answers stopped at the deadline."""
    done = [r for r in records if r.error is None]
    stopped = [r for r in done if r.finish_reason == "deadline"]
    shares = statistics.marginals(statistics.shares(r.knobs for r in done if r.knobs))
    return {
        "mean_ms": statistics.mean(r.total_ms for r in done),
        "knob_shares": dict(zip(KNOBS, shares, strict=True)),
        "stopped": {
            "num": len(stopped),
            "accuracy": statistics.mean(r.score for r in stopped if r.score is not None and not r.is_caption),
            "adherence": statistics.mean(r.on_time for r in stopped),
        },
    }


def render(result: Mapping[str, Any]) -> str:
    """Return the trade-off as text, a line for each budget; CIDEr is given times 100."""
    about = f"{', '.join(result['dataset'])} ({result['data_source']}), {result['model']} on {result['device']}"
    lines = [f"{about}, controller {result['controller']}", ""]
    has_captions = any("cider" in row for row in result["budgets"])
    cider = f" {'CIDEr':>8}" if has_captions else ""
    lines += [
        f"{'budget':>8} {'right':>8}{cider} {'on time':>8} {'interval':>15} {'used':>7}"
        + "".join(f" {name:>7}" for name in ("mean", "p50", "p95", "p99"))
    ]
    for row in result["budgets"]:
        low, high = row["adherence_wilson"]
        times = "".join(_cell(row[name], 7, "ms") for name in ("mean_ms", "p50_ms", "p95_ms", "p99_ms"))
        interval = f"{100 * low:.1f}-{100 * high:.1f}"
        cider = _cell(row["cider"], 8) if has_captions else ""
        lines.append(
            f"{row['budget_ms']:>8g}{_cell(row['accuracy'], 8)}{cider}{_cell(row['adherence'], 8)} {interval:>15}"
            f"{_cell(row['utilisation'], 7)}{times}"
        )
    stopped = sum(row["stopped"]["num"] for row in result["budgets"])
    lines += ["", f"stopped at the deadline: {stopped}; failed: {result['num_failed']}"]
    return "\n".join(lines) + "\n"


def _cell(value: float | None, width: int, unit: str = "%") -> str:
    if value is None:
        return f" {'-':>{width}}"
    return f" {value:>{width}.1f}" if unit == "ms" else f" {100 * value:>{width}.1f}"
