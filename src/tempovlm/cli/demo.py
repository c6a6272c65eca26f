"""`tempovlm demo`: example pictures answered at three budgets, a short bench, and an HTML report of both.

Examples, bench and report are made in `tempovlm.lab.bench`.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from tempovlm.cli import bench as bench_command
from tempovlm.cli import console
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import AXES
from tempovlm.core.paths import expanded

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tempovlm.api import TempoVLM
    from tempovlm.core.stamp import Stamp
    from tempovlm.lab.bench.showcase import Example, Shown

_MAX_FIGURE_CANDIDATES = 24

_DESCRIPTION = """\
Answer example pictures at a tight, a middle and a loose budget, run a short bench and write an HTML report.

Leaves report.html, images/, bench.json, records.jsonl and trade_off.svg in the output directory. The first use
on a machine measures it once (up to a minute)."""

_EXAMPLES = (
    "tempovlm demo",
    "tempovlm demo --output_dir /tmp/demo --num_samples 100",
    "tempovlm demo --budgets 80 150 250",
    "tempovlm demo --figure docs/figures/answer.svg",
)


@dataclass(frozen=True, kw_only=True)
class DemoArgs:
    """Flags of `tempovlm demo`.

    Attributes:
        output_dir: Folder for the report and the pictures.
        num_samples: Questions of the short bench; each is answered at every budget.
        budgets: Budgets in milliseconds. Default: a tight, a middle and a loose one for this machine.
        model: Model to load: pocket, a folder or a hub id.
        device: Device: auto, cpu, cuda or cuda:N.
        policy: Policy that chooses the setting. auto: the model's own controller for this kind of device if it has
            one, else the table. Or table, fixed (native), or the path of a checkpoint.
        seed: Seed for the pictures and the questions.
        figure: Draw only one question at the budgets into this SVG file, and stop. The first picture with
            different answers at the budgets is taken.
    """

    output_dir: Path = Path("demo")
    num_samples: int = 40
    budgets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="MS [MS ...]")] = ()
    model: Annotated[str, tyro.conf.arg(aliases=("--model_path",))] = "pocket"
    device: str = "auto"
    policy: str = "auto"
    seed: int = 0
    figure: Path | None = None

    def check(self) -> None:
        """Raise a `UserError` that names the first flag with an invalid value."""
        bench_command.read_budgets_ms(self.budgets)
        if self.num_samples < 1:
            raise UserError(f"--num_samples {self.num_samples}: must be at least 1")
        if self.figure is not None and (not self.figure.name or self.figure.is_dir()):
            raise UserError(f"--figure {str(self.figure)!r}: is a folder; name an SVG file")


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: invalid input.
    """
    args = console.parse(DemoArgs, argv, "demo", _DESCRIPTION, _EXAMPLES)
    args.check()
    from tempovlm.core.files import make_folder, writing_to

    notes = console.stderr()
    if args.figure is None:
        with writing_to(expanded(args.output_dir)) as folder:
            run_into(folder, args, notes)
        return
    figure = expanded(args.figure)
    make_folder(figure.parent, "--figure")
    model, budgets_ms = load(args, notes)
    draw_figure(model, figure, budgets_ms, args.seed)
    notes.print(f"wrote {figure}")


def load(args: DemoArgs, notes: Console) -> tuple[TempoVLM, Sequence[float]]:
    """Return the model on a calibrated machine, and the budgets to answer within."""
    from tempovlm.lab.bench import showcase

    model = bench_command.load_model(args.model, args.device, args.policy, notes)
    model.calibrate()
    budgets_ms = bench_command.read_budgets_ms(args.budgets)
    return model, budgets_ms or showcase.choose_budgets_ms(model.space, model.profile)


def run_into(folder: Path, args: DemoArgs, notes: Console) -> None:
    """Answer, measure, and write the report, in a locked folder."""
    from tempovlm.lab.bench import showcase

    out = console.stdout()
    model, budgets_ms = load(args, notes)
    examples = showcase.make_examples(folder / "images", seed=args.seed)
    notes.print(f"answering {len(examples)} pictures within {', '.join(f'{b:g}' for b in budgets_ms)} ms")
    shown = []
    for example, answers in showcase.answer_examples(model, examples, budgets_ms):
        shown.append((example, answers))
        out.print(table(example, answers))
    result = run_bench(model, args, budgets_ms, folder)
    out.print(bench_command.table(result))
    write_report(shown, result, folder)
    out.print(f"report: {folder / 'report.html'}", soft_wrap=True)


def table(example: Example, answers: Sequence[Shown]) -> Table:
    """Print one example's answers."""
    from rich.markup import escape
    from rich.table import Table

    title = f"{escape(example.question)}  [dim]{example.path} · right: {escape(example.truth)}[/]"
    shown = Table(title=title, title_justify="left", title_style="bold", min_width=76)
    shown.add_column("budget", justify="right")
    shown.add_column("answer", min_width=20)
    for knob in AXES.values():
        shown.add_column(knob.unit, justify="right" if knob.prefix else "left")
    shown.add_column("total", justify="right")
    shown.add_column("in time")
    for item in answers:
        knobs, ink = item.answer.knobs, "green" if item.is_right else "red"
        mark = "✓" if item.is_right else "✗"
        met = "yes" if item.answer.budget_met else "[red]no[/]"
        if item.answer.budget_feasible is False:
            met += " [dim](infeasible)[/]"
        shown.add_row(
            f"{item.budget_ms:g} ms",
            f"[{ink}]{mark}[/] {escape(item.spoken) or '[dim](nothing)[/]'}",
            *map(str, knobs.values),
            bench_command.milliseconds(item.answer.timings_ms["total"]),
            met,
        )
    return shown


def run_bench(model: TempoVLM, args: DemoArgs, budgets_ms: Sequence[float], folder: Path) -> dict[str, Any]:
    """Run a short bench at the same budgets; its files go beside the report."""
    from tempovlm.data.catalog import load_mixed

    bench_args = bench_command.BenchArgs(
        budgets=tuple(str(budget_ms) for budget_ms in budgets_ms),
        num_samples=args.num_samples,
        model=args.model,
        device=args.device,
        policy=args.policy,
        seed=args.seed,
        output_dir=folder,
    )
    samples = load_mixed(bench_args.dataset, args.num_samples, seed=args.seed)
    result, records = bench_command.measure_all(model, samples, bench_args)
    if not result["complete"]:
        raise KeyboardInterrupt
    bench_command.save(folder, result, records)
    return result


def write_report(
    shown: Sequence[tuple[Example, Sequence[Shown]]],
    result: dict[str, Any],
    folder: Path,
) -> None:
    """Write report.html."""
    from tempovlm.core.paths import write_whole
    from tempovlm.lab.bench.report import Report, render

    page = render(Report(examples=shown, bench=result, facts=result["stamp"]))
    write_whole(folder / "report.html", page)


def draw_figure(model: TempoVLM, path: Path, budgets_ms: Sequence[float], seed: int) -> None:
    """Draw the first of some signs that is read wrong at the tightest and right at the loosest budget.

    If there is none, the last one tried is drawn.
    """
    from tempovlm.core.paths import write_whole
    from tempovlm.lab.bench import showcase
    from tempovlm.lab.bench.report import answer_figure

    with tempfile.TemporaryDirectory() as folder:
        drawn = showcase.draw_examples(showcase.FIGURE, Path(folder), seed=seed)
        candidates = itertools.islice(drawn, _MAX_FIGURE_CANDIDATES)
        example, shown = next(showcase.answer_examples(model, [next(candidates)], budgets_ms))
        while not showcase.is_telling(shown) and (candidate := next(candidates, None)):
            example, shown = next(showcase.answer_examples(model, [candidate], budgets_ms))
        write_whole(path, answer_figure(example, shown, footer(model.stamp(), shown)))


def footer(stamp: Stamp, shown: Sequence[Shown]) -> str:
    """Return the source of a figure's numbers and how its picture was chosen, in one line."""
    from tempovlm.lab.bench.showcase import is_telling

    where = f"{stamp.model} (weights {stamp.weights[:12]}) on {stamp.hardware}, {stamp.threads} threads"
    return f"{where} · synthetic picture" + (", chosen because the budget matters" if is_telling(shown) else "")
