"""`tempovlm tune`: how accurate the settings are on your own questions. Parses, calls the library, prints."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from tempovlm.cli import calibrate, console
from tempovlm.core.decode_dtype import Backend, DecodeDtype
from tempovlm.core.errors import UserError
from tempovlm.core.files import make_folder
from tempovlm.core.paths import cache_dir
from tempovlm.data.metrics.rules import Rule
from tempovlm.data.own import SUFFIXES, describe, is_own
from tempovlm.data.registry import check_datasets, find_own
from tempovlm.data.scoring import check_scorable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from tempovlm.api import TempoVLM
    from tempovlm.control.policies import TunedTable
    from tempovlm.data.sample import Sample
    from tempovlm.lab.tune import Tuned

DESCRIPTION = """\
Measure how accurate the settings are on your own questions, and store it beside the calibration.

Settings that are not worth their time are ruled out early. The same command goes on where it was interrupted.
Afterwards --policy table:NAME chooses by what was measured, NAME being the file's without its ending, and
tempovlm bench FILE does so by itself."""

EXAMPLES = (
    "tempovlm tune my.csv",
    "tempovlm tune my.csv --model allenai/MolmoE-1B-0924 --num_samples 200",
    "tempovlm tune my.csv --split train --json",
    'tempovlm answer street.png "what does the sign say?" --budget_ms 150 --policy table:my',
)

_LEAST = 12

CACHE = "the cache (TEMPOVLM_CACHE_DIR)"
"""Name of the folder of answers and tables, in errors."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The command's flags.

    Attributes:
        data: Your own questions: a .csv, .jsonl or .parquet file with the columns image, question and answer;
            docs/adding.md says more. A hundred are a beginning.
        model: Model to load: pocket, a folder or a hub id.
        device: Where to run: auto, cpu, cuda or cuda:N.
        weights: Weights for decoding on CUDA: bf16 (as loaded), or one-byte copies, fp8 or int8.
        backend: Runs the model on a CPU: kernels, fast and in bfloat16 where the processor can, torch, or
            auto: the kernels where they can run.
        score: Rule for open questions; by default that of their column score, else vqa where ten people answered
            and exact elsewhere. Those with options are always scored by choice.
        split: Questions to use, by the column split; without one all are val.
        num_samples: Questions, drawn with the seed; by default all.
        max_new_tokens: Most tokens of an answer.
        seed: Draws the questions and their order.
        force: Ask everything again, even if an earlier run was finished or interrupted.
        json: Print one line with the result object on stdout; everything else goes to stderr.
    """

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    model: Annotated[str, tyro.conf.arg(aliases=("--model_path",))] = "pocket"
    device: str = "auto"
    weights: DecodeDtype = "bf16"
    backend: Backend = "auto"
    score: Rule | None = None
    split: Literal["val", "train"] = "val"
    num_samples: int | None = None
    max_new_tokens: int = 16
    seed: int = 0
    force: tyro.conf.FlagCreatePairsOff[bool] = False
    json: tyro.conf.FlagCreatePairsOff[bool] = False

    def check(self) -> None:
        """Raise a `UserError` that names the first flag whose value cannot be."""
        if not is_own(self.data):
            raise UserError(f"{self.data}: give a file of your own questions ({', '.join(SUFFIXES)})")
        if self.num_samples is not None and self.num_samples < _LEAST:
            raise UserError(f"--num_samples {self.num_samples}: must be at least {_LEAST}")
        if self.max_new_tokens < 1:
            raise UserError(f"--max_new_tokens {self.max_new_tokens}: must be at least 1")


def main(argv: list[str]) -> None:
    """Ask, store and print.

    Raises:
        UserError: wrong input.
        AllFailedError: no question could be answered.
    """
    flags = console.parse(Flags, argv, "tune", DESCRIPTION, EXAMPLES)
    flags.check()
    from tempovlm.api import load

    [name] = check_datasets([flags.data], "data", score=flags.score)
    samples = draw(name, flags)
    make_folder(cache_dir(), CACHE)  # now, and not when there are answers
    model = load(flags.model, device=flags.device, policy="table", weights=flags.weights, backend=flags.backend)
    model.calibrate()
    tuned = measure(model, name, samples, flags)
    stored = store(model, name, samples, tuned, flags)
    show(with_table(model, stored), stored, flags)


def draw(name: str, flags: Flags) -> list[Sample]:
    """The questions in a random order.

    Raises:
        UserError: there are too few of the split, or some cannot be scored one by one.
    """
    from tempovlm.data.catalog import load_samples

    own = find_own(name)
    assert own is not None
    number = flags.num_samples or len(own.samples)
    samples = load_samples(name, flags.split, num_samples=number, seed=flags.seed)
    if len(samples) < _LEAST:
        raise UserError(
            f"{flags.data}: has {len(samples)} questions of split {flags.split}; give at least {_LEAST}"
        )
    check_scorable(samples)
    return samples


def measure(model: TempoVLM, name: str, samples: Sequence[Sample], flags: Flags) -> Tuned:
    """Answer with a bar and the time left; answers are kept, so that the command can be interrupted."""
    import numpy as np

    from tempovlm.core.progress import progress_bar
    from tempovlm.data.digest import question_digests
    from tempovlm.lab.core_exp.ledger import Ledger
    from tempovlm.lab.core_exp.plan import SweepPlan
    from tempovlm.lab.tune import tune

    profile, settings = model.calibrate(), model.space.settings
    costs_ms = np.array([profile.p50_total_ms(i) for i in range(len(settings))])
    plan = SweepPlan(settings=settings, max_new_tokens=(flags.max_new_tokens,), seed=flags.seed)
    stamp = model.stamp(samples[0].data_source)
    folder = answers_folder(model, name, flags)
    if flags.force:
        shutil.rmtree(folder, ignore_errors=True)
    ledger = Ledger(folder, stamp, model.ranking, plan.conditions(flags.split), where=CACHE)
    title = f"answering {len(samples)} questions; settings that are not worth their time are ruled out"
    with ledger.opened([name], {name: question_digests(samples)}), progress_bar(title) as advance:
        return tune(model.engine, name, plan.jobs(samples), ledger, costs_ms, advance)


def answers_folder(model: TempoVLM, name: str, flags: Flags) -> Path:
    """Return the folder of a run's answers, one for each condition that makes them differ."""
    from tempovlm.control.policies import tuned_path
    from tempovlm.engine.environment import fingerprint

    path = tuned_path(model.weights_hash, name, _digest(name))
    about = (fingerprint(model.stamp()), flags.split, flags.score, flags.max_new_tokens, flags.seed)
    run = hashlib.sha256(repr(about).encode()).hexdigest()[:12]
    return path.with_suffix(".answers") / run


def store(model: TempoVLM, name: str, samples: Sequence[Sample], tuned: Tuned, flags: Flags) -> TunedTable:
    """Keep the accuracies in the cache directory.

    Raises:
        UserError: it cannot be written to.
    """
    from tempovlm.control.policies import save_tuned

    return save_tuned(
        {
            "name": name,
            "digest": _digest(name),
            "weights": model.weights_hash,
            "knob_space": model.space.fingerprint,
            "ranking": list(model.ranking.order),
            "num_questions": tuned.num_questions,
            "split": flags.split,
            "scored_by": describe(samples),
            "max_new_tokens": flags.max_new_tokens,
            "seed": flags.seed,
            "settings": tuned.rows(model.space),
            "stamp": model.stamp(samples[0].data_source).to_json(),
        }
    )


def _digest(name: str) -> str:
    own = find_own(name)
    assert own is not None
    return own.digest


def with_table(model: TempoVLM, stored: TunedTable) -> TempoVLM:
    """The same model with the policy that goes by stored accuracies."""
    return type(model)(model.engine, model.card, policy=stored.policy(model.space))


def show(model: TempoVLM, stored: TunedTable, flags: Flags) -> None:
    """The frontier, and what runs at round budgets."""
    guard = model.guard_for(calibrate.any_request(flags.max_new_tokens))
    if flags.json:
        budgets = calibrate.choices(guard)
        console.print_json({**stored.record, "path": str(stored.path), "budgets": budgets})
        return
    out, name = console.stdout(), guard.policy.name
    ruled_out = sum(row["ruled_out"] for row in stored.record["settings"])
    out.print(
        f"{stored.name}: {stored.record['num_questions']} questions, {len(model.space)} settings, of which "
        f"{ruled_out} were ruled out early; worth running:"
    )
    out.print(frontier_table(model, stored))
    calibrate.show_budgets(guard)
    out.print(f"stored in {stored.path}; to go by it: --policy {name}, or load(policy={name!r})")


def frontier_table(model: TempoVLM, stored: TunedTable) -> Table:
    """A row for each setting that is worth running, by cost."""
    from rich.table import Table

    profile, space = model.calibrate(), model.space
    rows: list[tuple[float, dict[str, Any], str]] = []
    for i, (knobs, row) in enumerate(zip(space, stored.record["settings"], strict=True)):
        if row["frontier"]:
            rows.append((profile.p50_total_ms(i), row, str(knobs)))
    shown = Table("setting", "accuracy", "95 % interval", "median", box=None, padding=(0, 2, 0, 0))
    for median_ms, row, setting in sorted(rows, key=lambda one: one[0]):
        low, high = row["interval"]
        shown.add_row(
            setting, f"{100 * row['accuracy']:.1f} %", f"{100 * low:.1f}–{100 * high:.1f}", f"{median_ms:.0f} ms"
        )
    return shown
