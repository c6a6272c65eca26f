"""`tempovlm bench`: a data set at several budgets, as a table, a JSON object and a trade-off plot.

Measuring and summarising are in `tempovlm.lab.bench`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from tempovlm.cli import console
from tempovlm.cli.knobs import ALL, Knobs
from tempovlm.core.decode_dtype import Backend, DecodeDtype
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobConfig, KnobSpace
from tempovlm.core.paths import expanded
from tempovlm.core.request import check_budget_ms, check_price_per_ms
from tempovlm.data.metrics.rules import Rule
from tempovlm.data.own import describe
from tempovlm.data.registry import DATASETS, GENERATED, SCORED_TOGETHER, check_datasets, find_own
from tempovlm.data.scoring import check_scorable
from tempovlm.lab.paper.export import Format, check_formats

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tempovlm.api import TempoVLM
    from tempovlm.data.sample import Sample
    from tempovlm.lab.bench.summary import Record

_DESCRIPTION = """\
Run a data set at several budgets, one question at a time: accuracy, share on time, latency, settings chosen.

Writes bench.json, records.jsonl and trade_off.svg to the output directory. Budgets take turns within each
question, and a fixed setting runs between them, so that the steadiness of the machine is known too."""

_EXAMPLES = (
    "tempovlm bench --budgets 60 100 150 200 300 --num_samples 200",
    "tempovlm bench --dataset text_vqa --budgets 100 200 --num_samples 50 --json",
    "tempovlm bench my.csv --budgets 100 200",
    "tempovlm bench --budgets 150 --fresh_processes 10",
    "tempovlm bench --budgets 60 100 150 --export csv latex pdf",
    "tempovlm bench --tiers low medium --policy my_policy.py:FewBlocks",
)


@dataclass(frozen=True, kw_only=True)
class BenchArgs:
    """Flags of `tempovlm bench`.

    Attributes:
        data: Your own questions, in place of --dataset: a .csv, .jsonl or .parquet file with the columns image,
            question and answer; docs/adding.md says more.
        score: Rule for your own questions; by default that of their column score, else vqa where ten people
            answered and exact elsewhere. Those with options are always scored by choice.
        budgets: Budgets in milliseconds.
        num_samples: Total number of questions; each is answered at every budget.
        dataset: Data sets, mixed in equal parts: any that `tempovlm data check` lists. Captions are scored by
            CIDEr over all pictures, times 100, beside the accuracy of the others.
        model: Model to load: pocket, a folder or a hub id.
        device: Device: auto, cpu, cuda or cuda:N.
        weights: Weights for decoding on CUDA: bf16 (as loaded), or one-byte copies, fp8 or int8.
        backend: Runs the model on a CPU: kernels, fast and in bfloat16 where the processor can, torch, or
            auto: the kernels where they can run.
        knobs: Settings to choose among.
        policy: Policy that chooses the setting. auto: for one file of your own questions, the table that tempovlm
            tune measured on it; else the model's own controller for this kind of device if it has one, else the
            table. table: the setting that was most accurate on test questions, of those that fit. table:NAME: the
            same as tuned on NAME. fixed: native. Or the path of a checkpoint, or module:Class or file.py:Class of
            your own.
        price_per_ms: Expected accuracy (as a share of 1) that a millisecond must gain; 0 may use the whole budget.
            For policies that predict accuracy: table, nearest neighbours, LinUCB.
        data_dir: Folder of the data. Default: the test bed in your cache directory, made if it is missing.
        fixed: Reference setting to run between the budgets, such as medium/k8/b12; native or none.
        fresh_processes: Number of questions to answer once more at each budget, each in a new process; these first
            answers count in the share on time. A process takes some seconds.
        max_new_tokens: Maximum number of generated tokens.
        seed: Seed for the questions and the order of the budgets.
        output_dir: Folder for the results.
        export: Files for papers, beside the results: csv (a tidy table), latex (a tabular of the package
            booktabs), pdf (the figure at a column's width). One or several.
        json: Print one line with the result object on stdout; everything else goes to stderr.
    """

    data: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[FILE ...]")] = ()
    score: Rule | None = None
    budgets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="MS [MS ...]")] = ("60", "100", "150", "200", "300")
    num_samples: int = 200
    dataset: tuple[str, ...] = GENERATED
    model: Annotated[str, tyro.conf.arg(aliases=("--model_path",))] = "pocket"
    device: str = "auto"
    weights: DecodeDtype = "bf16"
    backend: Backend = "auto"
    knobs: Knobs = ALL
    policy: str = "auto"
    price_per_ms: float = 0.0
    data_dir: Path | None = None
    fixed: str = "native"
    fresh_processes: int = 0
    max_new_tokens: int = 16
    seed: int = 0
    output_dir: Path = Path("bench_out")
    export: Annotated[tuple[Format, ...], tyro.conf.arg(metavar="{csv,latex,pdf} ...")] = ()
    json: console.Json = False

    @property
    def budgets_ms(self) -> tuple[float, ...]:
        """Return the budgets in ascending order, each once."""
        return read_budgets_ms(self.budgets)

    def check(self) -> None:
        """Raise a `UserError` that names the first flag with an invalid value."""
        if not self.budgets_ms:
            raise UserError("--budgets: give at least one, in milliseconds")
        for name, value, least in (
            ("num_samples", self.num_samples, 1),
            ("fresh_processes", self.fresh_processes, 0),
            ("max_new_tokens", self.max_new_tokens, 1),
        ):
            if value < least:
                raise UserError(f"--{name} {value}: must be at least {least}")
        check_price_per_ms(self.price_per_ms)
        check_formats(self.export)
        if not self.dataset:
            raise UserError(f"--dataset: give at least one of {', '.join(DATASETS)}")
        if self.data and self.dataset != GENERATED:
            raise UserError(f"--dataset {self.dataset[0]}: beside {self.data[0]}; give all files and names to one")
        self.names()

    def names(self) -> tuple[str, ...]:
        """The data sets by the names that results have; files are read and checked."""
        return tuple(check_datasets(self.data or self.dataset, "dataset", together=True, score=self.score))


def read_budgets_ms(texts: Sequence[str]) -> tuple[float, ...]:
    """Return the numbers of a flag `--budgets` in ascending order, each once.

    Raises:
        UserError: one is not a number, or not a possible budget.
    """
    budgets_ms = {value for text in texts if (value := console.number("budgets", text)) is not None}
    for budget_ms in budgets_ms:
        check_budget_ms(budget_ms, "budgets")
    return tuple(sorted(budgets_ms))


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: invalid input, or nothing could be answered.
    """
    args = console.parse(BenchArgs, argv, "bench", _DESCRIPTION, _EXAMPLES)
    args.check()
    from tempovlm.core.files import writing_to

    with writing_to(expanded(args.output_dir)) as folder:
        run_into(folder, args, console.stderr())


def run_into(folder: Path, args: BenchArgs, notes: Console) -> None:
    """Measure, write and show, in a locked folder.

    Raises:
        AllFailedError: every question failed.
    """
    from tempovlm.lab.bench.bench import errors_of
    from tempovlm.lab.core_exp.failures import ANEW, tell_failures

    result, records = run(args, notes)
    try:
        written = save(folder, result, records, args.export) if result["complete"] else []
    finally:
        # Write first and always show: neither a full disk nor a closed stdout loses the measurements.
        out = notes if args.json else console.stdout()
        out.print(table(result))
        if args.json:
            console.print_json(result)
    if not result["complete"]:
        notes.print("interrupted: nothing was written; the figures are of the requests done so far")
        raise KeyboardInterrupt
    notes.print(f"wrote {', '.join(map(str, written))}")
    tell_failures(errors_of(records), len(records), "answers", ANEW)


def run(args: BenchArgs, notes: Console) -> tuple[dict[str, Any], list[Record]]:
    """Load the model and the data and measure.

    Returns:
        The result object and its records. After Ctrl-C it has `complete: false`.
    """
    from tempovlm.data.catalog import load_mixed

    samples = load_mixed(args.names(), args.num_samples, data_dir=args.data_dir, seed=args.seed)
    check_scorable(samples)
    given = {"backend": args.backend, **args.knobs.chosen}
    model = load_model(args.model, args.device, args.policy, notes, args.weights, **given)
    model, args = _tuned(model, args, notes)
    model.check_price(args.price_per_ms)
    if args.policy != "fixed":
        # Before the lock for measurements, which calibration takes itself.
        model.calibrate()
    return measure_all(model, samples, args)


def _tuned(model: TempoVLM, args: BenchArgs, notes: Console) -> tuple[TempoVLM, BenchArgs]:
    """Take the policy that goes by own questions, with `auto` and one file that the model was tuned on."""
    from tempovlm.control.policies import TUNED, find_tuned

    own = find_own(args.names()[0])
    if args.policy != "auto" or own is None or len(args.names()) > 1 or args.knobs.ranking is not None:
        return model, args
    tuned = find_tuned(model.weights_hash, model.space, own.name, own.digest, model.ranking)
    if tuned is None:
        return model, args
    policy = tuned.policy(model.space)
    notes.print(
        f"{policy.name} chooses, by what tempovlm tune measured on this file's {tuned.record.get('split')} split: "
        "on the same questions accuracy comes out a little high; --policy table goes by the model's own table"
    )
    chosen = type(model)(model.engine, model.card, policy=policy)
    return chosen, replace(args, policy=f"{TUNED}{tuned.path}")


def load_model(
    name: str, device: str, policy: str, notes: Console, decode_dtype: DecodeDtype = "bf16", **chosen: Any
) -> TempoVLM:
    """Load the model, with a note on a terminal; `chosen` are further arguments of `load`."""
    import tempovlm

    with notes.status("loading the model") if notes.is_terminal else contextlib.nullcontext():
        return tempovlm.load(name, device=device, policy=policy, weights=decode_dtype, **chosen)


def measure_all(
    model: TempoVLM, samples: Sequence[Sample], args: BenchArgs
) -> tuple[dict[str, Any], list[Record]]:
    """Run every sample at every budget, with a bar and the time left, and summarise the records."""
    from tempovlm.core.machine import machine_lock, warn_if_busy
    from tempovlm.lab.bench import bench
    from tempovlm.lab.bench.summary import rounded

    plan = bench.BenchPlan(
        budgets_ms=args.budgets_ms,
        fixed=fixed_setting(args.fixed, model.space),
        slower_existed=bench.slower_than(model.space, model.profile),
        seed=args.seed,
        max_new_tokens=args.max_new_tokens,
        price_per_ms=args.price_per_ms,
    )
    records: list[Record] = []
    with machine_lock():
        busy = warn_if_busy("expect more answers to be late")
        source = bench.measure(model, samples, plan)
        complete = _collect(source, len(samples) * plan.runs_per_sample, "answering questions", records)
    fresh = samples[: args.fresh_processes]
    if complete and fresh:
        # Outside the lock: if the calibration could not be stored, a fresh process measures, and locks, itself.
        flags = ["--model", args.model, "--device", args.device, "--policy", args.policy]
        flags += ["--weights", args.weights, "--backend", args.backend]
        flags += ["--price_per_ms", repr(args.price_per_ms), *args.knobs.words]
        source = bench.measure_fresh(fresh, plan, flags)
        count = len(fresh) * len(plan.budgets_ms)
        complete = _collect(source, count, "answering in fresh processes", records)
    records = bench.score_together(records, samples)
    result = _result(model, samples, args, records, complete)
    result["busy_cores"] = busy
    return rounded(result), records


def _collect(source: Iterable[Record], total: int, title: str, records: list[Record]) -> bool:
    """Append the source's items, with a bar and the time left; return False if Ctrl-C ended it early."""
    from tempovlm.core.progress import progress_bar

    try:
        with progress_bar(title) as advance:
            for done, record in enumerate(source, start=1):
                records.append(record)
                advance(done, total)
    except KeyboardInterrupt:
        return False
    return True


def fixed_setting(name: str, space: KnobSpace) -> KnobConfig | None:
    """Return the setting of `--fixed`: native, none, or one written like medium/k8/b12."""
    if name == "none":
        return None
    if name == "native":
        return space.native
    for knobs in space:
        if str(knobs) == name:
            return knobs
    raise UserError(f"--fixed {name}: give native, none or a setting such as {space.cheapest}")


def _result(
    model: TempoVLM, samples: Sequence[Sample], args: BenchArgs, records: Sequence[Record], complete: bool
) -> dict[str, Any]:
    from tempovlm.lab.bench import summary

    data_source = ", ".join(sorted({sample.data_source for sample in samples}))
    stamp = model.stamp(data_source)
    return {
        **summary.summarise(records),
        "model": stamp.model,
        "device": stamp.device,
        "data_source": data_source,
        "dataset": list(args.names()),
        "scored_by": describe(samples),
        "knob_space": {name: list(legal) for name, legal in model.space.axes.items()},
        "num_samples": len(samples),
        "seed": args.seed,
        "policy": args.policy,
        "price_per_ms": args.price_per_ms,
        "chosen_by": sorted({record.policy for record in records if record.run == "budget" and record.policy}),
        "complete": complete,
        "stamp": stamp.to_json(),
        "schema": summary.SCHEMA,
    }


def save(
    folder: Path, result: dict[str, Any], records: Sequence[Record], formats: Sequence[Format] = ()
) -> list[Path]:
    """Write result, records, plot (if matplotlib is installed) and files for papers; return the paths."""
    import json

    from tempovlm.core.paths import write_whole
    from tempovlm.lab import charts
    from tempovlm.lab.bench import paper
    from tempovlm.lab.bench.summary import rounded
    from tempovlm.lab.drawing import can_draw
    from tempovlm.lab.paper import export

    lines = (json.dumps(rounded(record.to_json()), ensure_ascii=False) + "\n" for record in records)
    texts = {
        "records.jsonl": "".join(lines),
        "bench.json": json.dumps(result, indent=2, ensure_ascii=False) + "\n",
    }
    if can_draw():
        texts["trade_off.svg"] = charts.trade_off(result)
    for name, text in texts.items():
        write_whole(folder / name, text)
    written = [folder / name for name in texts]
    return written + (export.write(folder, paper.export(result, records), formats) if formats else [])


def table(result: dict[str, Any]) -> Table:
    """Return the result as a table at most 80 columns wide."""
    from rich.table import Table

    about = f"{result['model']} on {result['device']} · {', '.join(result['dataset'])} ({result['data_source']})"
    title = f"{result['num_samples']} questions · {about}"
    shown = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption=_caption(result),
        caption_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
    )
    heads = _score_heads(result)
    for head in ("budget", *heads, "on time", "interval", "used", "p50", "p95", "p99"):
        shown.add_column(head, justify="right", no_wrap=True)
    shown.add_column("most chosen", no_wrap=True)
    for row in result["budgets"]:
        low, high = row["adherence_wilson"]
        name, share = next(iter(row["knobs"].items()), ("", 0.0))
        shown.add_row(
            f"{row['budget_ms']:g} ms",
            *_score_cells(row, heads),
            percent(row["adherence"]),
            f"{100 * low:.1f}–{100 * high:.1f}",
            percent(row["utilisation"]),
            *(milliseconds(row[key]) for key in ("p50_ms", "p95_ms", "p99_ms")),
            f"{name} {share:.0%}" if name else "",
        )
    if fixed := result["fixed"]:
        times = (milliseconds(fixed[key]) for key in ("p50_ms", "p95_ms", "p99_ms"))
        shown.add_row("fixed", *_score_cells(fixed, heads), "", "", "", *times, fixed["knobs"])
    return shown


def _score_heads(result: dict[str, Any]) -> tuple[str, ...]:
    """Return the columns for accuracy, CIDEr or both, as the questions are scored."""
    names = set(result["dataset"])
    right = ("right",) if names - SCORED_TOGETHER else ()
    return (*right, "CIDEr") if names & SCORED_TOGETHER else right


def _score_cells(row: dict[str, Any], heads: tuple[str, ...]) -> list[str]:
    cells = {"right": percent(row["accuracy"]), "CIDEr": hundredfold(row.get("cider"))}
    return [cells[head] for head in heads]


def _caption(result: dict[str, Any]) -> str:
    from rich.markup import escape

    parts = ["on time: total within the budget, with its 95 % Wilson interval; used: total / budget"]
    if result["scored_by"]:
        parts.append(result["scored_by"])
    if set(result["dataset"]) & SCORED_TOGETHER:
        parts.append("CIDEr: of all captions together, times 100")
    if (fixed := result["fixed"]) and fixed["p99_over_p50"] is not None:
        parts.append(f"fixed {fixed['knobs']}: p99/p50 {fixed['p99_over_p50']:.2f}")
    fresh = [row["fresh"] for row in result["budgets"] if "fresh" in row]
    if fresh:
        count = sum(row["num_samples"] for row in fresh)
        on_time = sum(row["num_samples"] * row["adherence"] for row in fresh)
        parts.append(f"first answers of fresh processes on time: {on_time:.0f} of {count}")
    if result["num_failed"]:
        parts.append(f"failed: {result['num_failed']}, the first: {escape(result['failures'][0]['error'])}")
    return "\n".join(parts)


def percent(value: float | None) -> str:
    """Format a share."""
    return "–" if value is None else f"{100 * value:.1f} %"


def hundredfold(cider: float | None) -> str:
    """Format CIDEr times 100, as usual."""
    return "–" if cider is None else f"{100 * cider:.1f}"


def milliseconds(value_ms: float | None) -> str:
    """Format a time."""
    return "–" if value_ms is None else f"{value_ms:.0f} ms"
