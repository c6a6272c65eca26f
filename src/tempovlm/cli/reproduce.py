"""`tempovlm reproduce`: the eight experiments in their order, in one folder, resumable, with the table at the end.

It parses flags, finds a checkout, and runs the chain of `experiments/reproduce.py` there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from tempovlm.cli import console
from tempovlm.cli.checkout import find_checkout, import_experiments

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """The command's flags."""

    output_dir: Path
    """Folder of the run; run again with it to resume."""
    model: Annotated[str, tyro.conf.arg(aliases=("--model_path",))] = "pocket"
    """`pocket`, which is embedded, a local model folder or a hub id."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
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
    checkout = find_checkout(flags.repository)
    import_experiments(checkout, "reproduce").main(flags, checkout)
