"""Exp 8: a data set answered within budgets by a loaded model and its controller, sample by sample, resumable.

It measures and summarises with `tempovlm bench`, adds the experiment's own fields to the file, writes the records
of all requests to a Parquet file beside it, keeps finished records on disk, and prints the trade-off. The model is
only used through `answer`. Needs the extra `experiments`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

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
from tempovlm.lab.core_exp.parquet import SCHEMA_KEY, as_parquet, labels, read_table
from tempovlm.lab.options import AdaptiveFlags

if TYPE_CHECKING:
    import pyarrow as pa

_log = logging.getLogger("tempovlm")

SCHEMA = "tempovlm.adaptive_inference/3"
"""Of the result file and of the records."""

_IN_DATA = ("question", "references", "picture")
"""Fields of a record that are not written: they are the data's, and the same at each budget."""

_TIMES = "timings_ms."
_PREDICTED = ("predicted_p50_ms", "predicted_upper_ms")


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


def check_output(path: Path) -> None:
    """Check that records can be written beside a result file; now and not in an hour, when there are records.

    Raises:
        UserError: the result file has the records' name.
        ModuleNotFoundError: pyarrow is not installed.
    """
    if path.suffix == ".parquet":
        raise UserError(f"--output_path {path}: is where the records go; give a name that ends in .json")
    if find_spec("pyarrow") is None:
        raise ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow")


def run(model: Loaded, plan: Plan, path: Path) -> dict[str, Any]:
    """Answer the remaining questions, with a bar and the time left, and write the records and the result file.

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
        write(path, result, records, stamp)
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
    }


def records_path(path: Path) -> Path:
    """Return where the records of a result file are: beside it, with `.parquet` in place of `.json`."""
    return path.with_name(f"{path.name.removesuffix('.json')}.parquet")


def write(path: Path, result: dict[str, Any], records: Sequence[Record], stamp: Stamp) -> None:
    """Write the records and then the result file, which is never there without its own records.

    Args:
        path: the result file. One that is there is removed before its records are replaced.
        result: its fields; `records`, the name of the other file and the number of its rows, is added.
        records: of all requests, in the order of the rows.
        stamp: of the records.

    Raises:
        UserError: a file cannot be written.
    """
    rows = records_as_parquet(records, stamp)
    result["records"] = {"file": records_path(path).name, "count": len(records)}
    path.unlink(missing_ok=True)
    write_whole(records_path(path), rows)
    write_whole(path, json.dumps(rounded(result), indent=1, ensure_ascii=False) + "\n")


def records_as_parquet(records: Sequence[Record], stamp: Stamp) -> bytes:
    """Return a Parquet file with a row for each record, and null where a record has no value.

    The time of a stage is in a column of its own, `timings_ms.prefill` and so on. Times of the clock and
    predicted ones are decimals of four digits, as all figures are rounded to: they take two thirds of what floats
    do. Their bytes are stored by place, since the high ones repeat.
    """
    import pyarrow as pa

    flat = []
    for record in records:
        row = {name: value for name, value in rounded(record.to_json()).items() if name not in _IN_DATA}
        row |= {f"{_TIMES}{stage}": time_ms for stage, time_ms in row.pop("timings_ms").items()}
        clocked = (name for name in row if name in _PREDICTED or name.startswith(_TIMES))
        flat.append(row | {name: _decimal(row[name]) for name in clocked})
    schema = _columns(list(dict.fromkeys(name for row in flat for name in row if name.startswith(_TIMES))))
    decimal = [column.name for column in schema if pa.types.is_decimal(column.type)]
    return as_parquet(
        pa.Table.from_pylist(flat, schema=schema.with_metadata(labels(stamp, SCHEMA))),
        store_decimal_as_integer=True,
        use_dictionary=[name for name in schema.names if name not in decimal],
        column_encoding=dict.fromkeys(decimal, "BYTE_STREAM_SPLIT"),
    )


def read_records(path: Path) -> list[Record]:
    """Read the records of a run as they were measured, but for what the data have: question, references, picture.

    Raises:
        UserError: the file is missing, damaged, or of another kind.
    """
    table = read_table(path)
    schema = (table.schema.metadata or {}).get(SCHEMA_KEY, b"").decode()
    if schema != SCHEMA:
        raise UserError(f"{path}: its schema is {schema or 'none'}, not {SCHEMA}: these are no records of Exp 8")
    records = []
    for row in table.to_pylist():
        plain: dict[str, Any] = {n: float(v) if isinstance(v, Decimal) else v for n, v in row.items()}
        times = {name.removeprefix(_TIMES): plain.pop(name) for name in row if name.startswith(_TIMES)}
        timings_ms = {stage: time_ms for stage, time_ms in times.items() if time_ms is not None}
        records.append(Record(**plain, timings_ms=timings_ms))
    return records


def _columns(times: Sequence[str]) -> pa.Schema:
    """Return names and types of the columns: the fields of a record, and the times of its stages."""
    import pyarrow as pa

    decimal = pa.decimal128(18, 4)
    types = {
        **dict.fromkeys(("budget_ms", "score"), pa.float64()),
        **dict.fromkeys(("feasible", "slower_existed"), pa.bool_()),
        "num_output_tokens": pa.int32(),
        **dict.fromkeys(_PREDICTED, decimal),
    }
    names = [field.name for field in fields(Record) if field.name not in (*_IN_DATA, "timings_ms")]
    return pa.schema([(name, types.get(name, pa.string())) for name in names] + [(n, decimal) for n in times])


def _decimal(value: float | None) -> Decimal | None:
    return None if value is None else Decimal(f"{value:.4f}")


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
