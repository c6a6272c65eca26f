"""Run the eight experiments in one folder, resumable, and show the targets beside the measured values.

The folder is laid out like the repository, so that every run finds the outputs of those before it where the
experiment protocol says. `recipes.chain` lists the runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from experiments.recipes import ANEW, ANSWERS, GPU_PLACE, SHIPPED, SMOKE, TAKE, Counts, Run, Setup, chain
from tempovlm.cli import console
from tempovlm.core.errors import UserError
from tempovlm.core.files import make_folder, writing_to
from tempovlm.core.paths import write_whole
from tempovlm.core.units import now_ms

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from experiments.scoreboard.report import Row
    from tempovlm.cli.reproduce import Flags

JOURNAL, SCHEMA = "reproduce.json", "tempovlm.reproduce/1"
TABLE_FILE = "results_table.json"

_NEEDED = ("pandas", "pyarrow", "scipy", "sklearn", "matplotlib", "tensorboard")
_MINUTE_MS = 60_000


def main(flags: Flags, repository: Path) -> None:
    """Run what is left to do, and print the table.

    Raises:
        UserError: wrong input, another process writes to the folder, or a run failed.
    """
    if flags.output_dir.resolve() == repository:
        raise UserError(
            f"--output_dir {flags.output_dir}: is the repository itself, whose results would be replaced; give "
            "another folder"
        )
    notes = console.stderr()
    with writing_to(flags.output_dir):
        setup = read_setup(flags, repository, notes)
        folder = flags.output_dir.resolve()
        kept = Journal.open(folder, setup.conditions())
        run_all(chain(setup), kept, repository, setup, notes)
        console.stdout().print(table(write_table(folder)))
        notes.print(f"{minutes(sum(kept.took_ms.values()))} of work in {len(kept.took_ms)} steps")
        for name in (TABLE_FILE, f"results/evaluate/pocket_{setup.place}/judge.html"):
            console.stdout().print(str(flags.output_dir / name))


def read_setup(flags: Flags, repository: Path, notes: Console) -> Setup:
    """Return what is to run, checked before anything is run.

    Raises:
        UserError: no such model, device or data.
    """
    from tempovlm.api import model_folder
    from tempovlm.engine.threads import pick_device, prepare

    for package in _NEEDED:
        # Check now, not in the run that needs it: that may be ten minutes away.
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(name=package)
    if flags.data_dir is not None and not flags.data_dir.is_dir():
        raise UserError(f"--data_dir {flags.data_dir}: no such folder")
    folder = model_folder(flags.model)
    prepare()
    # Imported after threads are set, which must be done before torch is imported.
    from tempovlm.core.knobs import KnobSpace
    from tempovlm.core.plan import Ranking
    from tempovlm.data.registry import GENERATED
    from tempovlm.lab.core_exp import reuse
    from tempovlm.model.files.card import ModelCard
    from tempovlm.model.weights import read_config, weights_hash

    device, hashed = pick_device(flags.device), weights_hash(folder)
    shape = read_config(folder).shape
    space = KnobSpace.for_model(shape)
    has_shipped = False
    # The few pictures that a smoke run draws are none of those that the shipped answers are about.
    if not flags.from_scratch and not (flags.smoke and flags.data_dir is None):
        places = [repository / name for name in ANSWERS.values()]
        ranking = ModelCard.read(folder, space).ranking or Ranking.evenly_spaced(shape.num_blocks)
        why = reuse.missing(places, GENERATED, hashed, space.fingerprint, ranking.order)
        has_shipped = why is None
        if why is not None:
            notes.print(f"accuracies are measured, with fewer questions: {why}")
    counts = SHIPPED if has_shipped else ANEW
    counts = SMOKE if flags.smoke else counts
    return Setup(
        model=str(folder.resolve()) if Path(flags.model).expanduser().is_dir() else flags.model,
        weights=hashed,
        device=str(device),
        place="cpu" if device.type == "cpu" else GPU_PLACE,
        counts=counts,
        data_dir=None if flags.data_dir is None else flags.data_dir.resolve(),
        has_shipped=has_shipped,
        questions=None if flags.data_dir is None else data_digest(flags.data_dir, counts),
    )


def data_digest(data_dir: Path, counts: Counts) -> str:
    """Return twelve hex digits of the questions and answers that a chain draws from a folder.

    Pictures are compared by the runs that read them: one that was missing and is back is no other one.
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


@dataclass(slots=True)
class Journal:
    """The journal of finished runs, so that a kill at any moment loses one run at most.

    Attributes:
        folder: of the chain. conditions: what all its runs have in common.
        took_ms: by the name of each run that ended.
    """

    folder: Path
    conditions: Mapping[str, Any]
    took_ms: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, conditions: Mapping[str, Any]) -> Journal:
        """Take up what is there.

        Raises:
            UserError: the folder holds a chain of other conditions, or a damaged journal.
        """
        path = folder / JOURNAL
        if not path.exists():
            return cls(folder, conditions)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            before, took_ms = record["conditions"], {k: float(v) for k, v in record["took_ms"].items()}
            # A condition that a journal of another version does not hold cannot be compared.
            differs = [name for name in conditions if before.get(name, conditions[name]) != conditions[name]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: damaged ({error!r}); use another --output_dir") from None
        if differs:
            raise UserError(
                f"--output_dir {folder}: holds a run with another {', '.join(differs)} ({path.name} says which); "
                "repeat that command to go on, or use another folder"
            )
        return cls(folder, conditions, took_ms)

    def is_done(self, run: Run) -> bool:
        """Whether the run ended and its outputs are still there."""
        return run.name in self.took_ms and all((self.folder / name).exists() for name in run.outputs)

    def start(self, runs: Iterable[Run]) -> list[Run]:
        """Return the remaining runs: the first that is not done and all after it, which depend on it."""
        left: list[Run] = []
        for run in runs:
            if left or not self.is_done(run):
                left.append(run)
                self.took_ms.pop(run.name, None)
        return left

    def finish(self, run: Run, took_ms: float) -> None:
        """Keep that a run ended.

        Raises:
            UserError: an output is missing, or the folder cannot be written.
        """
        for name in run.outputs:
            if not (self.folder / name).exists():
                raise UserError(f"{self.folder / name}: was not written; see logs/{run.name}.txt beside it")
        self.took_ms[run.name] = took_ms
        record = {"schema": SCHEMA, "conditions": dict(self.conditions), "took_ms": self.took_ms}
        write_whole(self.folder / JOURNAL, json.dumps(record, indent=1) + "\n")

    def left_ms(self, runs: Iterable[Run], left: Iterable[Run]) -> float:
        """Estimate the time of the remaining runs by the pace of the finished ones.

        A third of the whole chain counts as finished at the expected pace, or the first short runs would decide.
        """
        known = [run for run in runs if run.name in self.took_ms]
        prior_ms = sum(run.about_ms for run in runs) / 3
        expected_ms = prior_ms + sum(run.about_ms for run in known)
        pace = (prior_ms + sum(self.took_ms[run.name] for run in known)) / expected_ms if expected_ms else 1.0
        return pace * sum(run.about_ms for run in left)


def run_all(runs: Sequence[Run], kept: Journal, repository: Path, setup: Setup, notes: Console) -> None:
    """Run what is not done, one after another, and show the progress."""
    left = kept.start(runs)
    notes.print(f"{len(runs)} steps, {len(runs) - len(left)} of them done already")
    for place, run in enumerate(runs, start=1):
        head = f"[{place}/{len(runs)}] {run.title}: {run.counts}"
        if run not in left:
            notes.print(f"{head}; done", markup=False)
            continue
        rest = left[left.index(run) :]
        notes.print(f"{head}; about {minutes(kept.left_ms(runs, rest))} left", markup=False)
        start_ms = now_ms()
        try:
            run_one(run, kept.folder, repository, setup)
        except UserError as error:
            raise type(error)(f"{run.title}: {error.flagged}") from None
        except KeyboardInterrupt:
            notes.print("run the same command again to resume")
            raise
        kept.finish(run, now_ms() - start_ms)


def run_one(run: Run, folder: Path, repository: Path, setup: Setup) -> None:
    """Run in the chain's folder; what is printed goes to a log there."""
    log = make_folder(folder / "logs") / f"{run.name}.txt"
    with contextlib.chdir(folder), log.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        if run.command == TAKE:
            file.write(json.dumps(take(run, repository, setup)) + "\n")
        else:
            command(run.command, repository)(list(run.flags))


def command(name: str, repository: Path) -> Callable[[list[str]], None]:
    """Return the main function of a script of the checkout, or of a subcommand."""
    if not name.endswith(".py"):
        return cast("Callable[[list[str]], None]", importlib.import_module(f"tempovlm.cli.{name}").main)
    path = repository / name
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"{path}: no such script; the checkout is not of this version")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return cast("Callable[[list[str]], None]", module.main)


def take(run: Run, repository: Path, setup: Setup) -> dict[str, int]:
    """Copy rows of shipped results about the questions of this chain; how many questions of each data set."""
    from tempovlm.data.catalog import load_samples
    from tempovlm.data.registry import GENERATED
    from tempovlm.lab.core_exp.reuse import take_results

    name, split, count = run.flags
    every = {one: load_samples(one, split, data_dir=setup.data) for one in GENERATED}
    drawn = {
        one: load_samples(one, split, data_dir=setup.data, num_samples=len(samples), seed=42)
        for one, samples in every.items()
    }
    return take_results(repository / name, Path(name), drawn, int(count))


def write_table(folder: Path) -> list[Row]:
    """Judge every promised figure that this chain measured; also as a file."""
    from experiments.scoreboard.report import rows_of_run

    rows = rows_of_run(folder)
    record = {"targets": [row.to_json() for row in rows]}
    write_whole(folder / TABLE_FILE, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return rows


def table(rows: Sequence[Row]) -> Table:
    """Format the targets beside the measured values."""
    from rich.markup import escape
    from rich.table import Table

    from experiments.scoreboard.report import verdict

    title = "promised, and measured with this run's sample counts"
    out = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    for head, ratio in (("figure", 5), ("seed", 2), ("ours", 3), ("measured", 2), ("met", 2)):
        out.add_column(head, overflow="fold", ratio=ratio)
    before = None
    for row in rows:
        target = row.target
        if target.experiment != before:
            out.add_row(f"[bold]{target.experiment}[/bold]")
            before = target.experiment
        cells = (target.about, target.seed, target.our_target, row.value, verdict(row).strip("*"))
        out.add_row(*map(escape, cells))
    return out


def minutes(time_ms: float) -> str:
    """Format a time."""
    return f"{max(time_ms, 0.0) / _MINUTE_MS:.0f} min"
