"""`tempovlm reproduce`: the eight experiments in their order, in one folder, resumable, with the table at the end.

It parses flags, runs the scripts of a checkout one after another in this process, shows how far they are and what
came of them. Which steps there are, with how many samples, is in `tempovlm.evaluation`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import tyro

from tempovlm.cli import console
from tempovlm.core.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tempovlm.evaluation.journal import Journal
    from tempovlm.evaluation.reproduction import Counts, Setup, Step
    from tempovlm.evaluation.results_report import Row

DESCRIPTION = """\
Run Exp 6, 7, 1, 2, 3, 4, 5 and 8 with few samples, and put what was promised beside what was measured.

Accuracies at all settings are taken from the repository's results where they are of this model; times are measured
on this machine. That takes less than half an hour on two cores; run the same command again to resume. Needs a
checkout: the scripts under experiments/ are not in the package. Figures go to the output directory, laid out like
the repository, with a log of each step, results_table.json and the judge's HTML report."""

EXAMPLES = (
    "tempovlm reproduce --model pocket --device cpu --output_dir runs/reproduce",
    "tempovlm reproduce --output_dir runs/anew --from_scratch",
    "tempovlm reproduce --output_dir runs/smoke --smoke",
)

TABLE_FILE = "results_table.json"

_SCRIPTS = Path("experiments/controller")
_NEEDED = ("pandas", "pyarrow", "scipy", "sklearn", "matplotlib", "tensorboard")
_MINUTE_MS = 60_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """The command's flags."""

    output_dir: Path
    """Folder of the run; run again with it to resume."""
    model: Annotated[str, tyro.conf.arg(aliases=("--model_path",))] = "pocket"
    """`pocket`, which is embedded, a local model folder or a hub id."""
    device: str = "auto"
    """auto, cpu or cuda."""
    data_dir: Path | None = None
    """Folder of the data sets; a test bed is drawn into the run's folder unless told."""
    from_scratch: tyro.conf.FlagCreatePairsOff[bool] = False
    """Measure accuracies too, with fewer questions, whatever the repository has."""
    smoke: tyro.conf.FlagCreatePairsOff[bool] = False
    """A handful of samples and two epochs: every step runs, and the figures mean nothing."""
    repository: Path | None = None
    """Root of the checkout; that of the package, or the current directory, unless told."""


def main(argv: list[str]) -> None:
    """Run what is left to do, and print the table.

    Raises:
        UserError: wrong input, or a step failed.
    """
    flags = console.parse(Flags, argv, "reproduce", DESCRIPTION, EXAMPLES)
    from tempovlm.evaluation.files import writing_to

    notes = console.stderr()
    repository = find_repository(flags.repository)
    if flags.output_dir.resolve() == repository:
        raise UserError(
            f"--output_dir {flags.output_dir}: is the repository itself, whose results would be replaced; give "
            "another folder"
        )
    with writing_to(flags.output_dir):
        run_chain(flags, repository, notes)


def run_chain(flags: Flags, repository: Path, notes: Console) -> None:
    """Run what is left to do in a folder that is held, and print the table.

    Raises:
        UserError: wrong input, or a step failed.
    """
    setup = read_setup(flags, repository, notes)
    from tempovlm.evaluation.journal import Journal
    from tempovlm.evaluation.reproduction_steps import steps

    folder = flags.output_dir.resolve()
    kept = Journal.open(folder, setup.conditions())
    run(steps(setup), kept, repository, setup, notes)
    rows = write_table(folder)
    console.stdout().print(table(rows))
    taken_ms = sum(kept.took_ms.values())
    notes.print(f"{minutes(taken_ms)} of work in {len(kept.took_ms)} steps")
    for name in (TABLE_FILE, f"results/evaluate/pocket_{setup.place}/judge.html"):
        console.stdout().print(str(flags.output_dir / name))


def find_repository(given: Path | None) -> Path:
    """The root of a checkout.

    Raises:
        UserError: the scripts are not there.
    """
    import tempovlm

    places = [given] if given else [Path(str(tempovlm.__file__)).parents[2], Path.cwd()]
    for place in places:
        if (place / _SCRIPTS).is_dir():
            return place.resolve()
    named = "--repository" if given is None else f"--repository {given}"
    raise UserError(
        f"{named}: no folder {_SCRIPTS} there; the scripts are not part of the package: run this in a checkout of "
        "the repository, or give its root"
    )


def read_setup(flags: Flags, repository: Path, notes: Console) -> Setup:
    """What is to run, checked before anything is run.

    Raises:
        UserError: no such model, device or data.
    """
    from tempovlm.api import model_folder
    from tempovlm.engine.threads import pick_device, prepare

    for package in _NEEDED:
        # Told now, not by the step that needs it: that may be ten minutes away.
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(name=package)
    if flags.data_dir is not None and not flags.data_dir.is_dir():
        raise UserError(f"--data_dir {flags.data_dir}: no such folder")
    folder = model_folder(flags.model)
    prepare()
    # Imported now that threads are set, which must be done before torch is there.
    from tempovlm.core.knobs import KnobSpace
    from tempovlm.core.plan import Ranking
    from tempovlm.data.registry import GENERATED
    from tempovlm.evaluation import reproduction
    from tempovlm.evaluation.targets.devices import place_of
    from tempovlm.model.card import ModelCard
    from tempovlm.model.weights import read_config, weights_hash
    from tempovlm.profiling import shipped
    from tempovlm.profiling.environment import hardware_name

    device, weights = pick_device(flags.device), weights_hash(folder)
    shape = read_config(folder).shape
    space = KnobSpace.for_model(shape)
    has_shipped = False
    if not flags.from_scratch:
        places = [repository / "results" / name for name in reproduction.SWEEPS.values()]
        ranking = ModelCard.read(folder, space).ranking or Ranking.evenly_spaced(shape.num_blocks)
        why = shipped.missing(places, GENERATED, weights, space.fingerprint, ranking.order)
        has_shipped = why is None
        if why is not None:
            notes.print(f"accuracies are measured, with fewer questions: {why}")
    counts = reproduction.SHIPPED if has_shipped else reproduction.ANEW
    counts = reproduction.SMOKE if flags.smoke else counts
    return reproduction.Setup(
        model=str(folder.resolve()) if Path(flags.model).expanduser().is_dir() else flags.model,
        weights=weights,
        device=str(device),
        place=place_of(device.type, hardware_name(device)),
        counts=counts,
        data_dir=None if flags.data_dir is None else flags.data_dir.resolve(),
        has_shipped=has_shipped,
        questions=None if flags.data_dir is None else data_digest(flags.data_dir, counts),
    )


def data_digest(data_dir: Path, counts: Counts) -> str:
    """Twelve hex digits of the questions and answers that a run draws from a folder.

    Pictures are compared by the steps that read them: one that was missing and is back is no other one.
    """
    from tempovlm.data.catalog import load_samples
    from tempovlm.data.digest import text_digits
    from tempovlm.data.registry import GENERATED

    drawn = [
        text_digits(sample)
        for name in GENERATED
        for split, count in (("train", counts.train), ("val", counts.val))
        for sample in load_samples(name, split, data_dir=data_dir, num_samples=count, seed=42)
    ]
    return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:12]


def run(steps: Sequence[Step], kept: Journal, repository: Path, setup: Setup, notes: Console) -> None:
    """Run what is not done, one step after another, and say how far it is."""
    from tempovlm.core.units import now_ms

    left = kept.start(steps)
    notes.print(f"{len(steps)} steps, {len(steps) - len(left)} of them done already")
    for place, step in enumerate(steps, start=1):
        head = f"[{place}/{len(steps)}] {step.title}: {step.counts}"
        if step not in left:
            notes.print(f"{head}; done", markup=False)
            continue
        rest = left[left.index(step) :]
        notes.print(f"{head}; about {minutes(kept.left_ms(steps, rest))} left", markup=False)
        start_ms = now_ms()
        try:
            run_step(step, kept.folder, repository, setup)
        except UserError as error:
            raise type(error)(f"{step.title}: {error}") from None
        except KeyboardInterrupt:
            notes.print("run the same command again to resume")
            raise
        kept.finish(step, now_ms() - start_ms)


def run_step(step: Step, folder: Path, repository: Path, setup: Setup) -> None:
    """Run one step in the run's folder; what it prints goes to a log there."""
    from tempovlm.evaluation.files import make_folder
    from tempovlm.evaluation.reproduction import TAKE

    log = make_folder(folder / "logs") / f"{step.name}.txt"
    with contextlib.chdir(folder), log.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        if step.command == TAKE:
            file.write(json.dumps(take(step, repository, setup)) + "\n")
        else:
            command(step.command, repository)(list(step.words))


def command(name: str, repository: Path) -> Callable[[list[str]], None]:
    """The main function of a script of the checkout, or of a subcommand."""
    if not name.endswith(".py"):
        return cast("Callable[[list[str]], None]", importlib.import_module(f"tempovlm.cli.{name}").main)
    path = repository / name
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"{path}: no such script; the checkout is not of this version")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast("Callable[[list[str]], None]", module.main)


def take(step: Step, repository: Path, setup: Setup) -> dict[str, int]:
    """Rows of shipped results about the questions of this run; how many questions of each data set."""
    from tempovlm.data.catalog import load_samples
    from tempovlm.data.registry import GENERATED
    from tempovlm.profiling.shipped import take_results

    name, split, count = step.words
    every = {one: load_samples(one, split, data_dir=setup.data) for one in GENERATED}
    drawn = {
        one: load_samples(one, split, data_dir=setup.data, num_samples=len(samples), seed=42)
        for one, samples in every.items()
    }
    return take_results(repository / "results" / name, Path("results") / name, drawn, int(count))


def write_table(folder: Path) -> list[Row]:
    """Every promised figure that this run measured, judged; also as a file."""
    from tempovlm.core.paths import write_whole
    from tempovlm.evaluation.results_report import rows_of_run

    rows = rows_of_run(folder)
    record = {"targets": [row.to_json() for row in rows]}
    write_whole(folder / TABLE_FILE, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return rows


def table(rows: Sequence[Row]) -> Table:
    """Targets beside what was measured, for people."""
    from rich.markup import escape
    from rich.table import Table

    from tempovlm.evaluation.results_report import shown, verdict

    title = "promised, and measured with this run's sample counts"
    out = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    for head, ratio in (("figure", 5), ("seed", 2), ("ours", 3), ("measured", 2), ("met", 2)):
        out.add_column(head, overflow="fold", ratio=ratio)
    before = None
    for row in rows:
        target = row.target
        value = "–" if row.measured is None else f"{shown(row.measured, target.bound)} {target.unit}".strip()
        if target.experiment != before:
            out.add_row(f"[bold]{target.experiment}[/bold]")
            before = target.experiment
        cells = (target.about, target.seed, target.our_target, value, verdict(row).strip("*"))
        out.add_row(*map(escape, cells))
    return out


def minutes(time_ms: float) -> str:
    """A time for people."""
    return f"{max(time_ms, 0.0) / _MINUTE_MS:.0f} min"
