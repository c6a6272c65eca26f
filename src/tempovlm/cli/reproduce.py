"""`tempovlm reproduce`: the eight experiments in order, in one folder, resumable, with the table at the end.

The chain is in the checkout's `experiments/reproduce.py`.
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
    """Flags of `tempovlm reproduce`."""

    output_dir: Path
    """Folder of the run; use it again to resume."""
    model: Annotated[str, tyro.conf.arg(aliases=("--model_path",))] = "pocket"
    """`pocket` (part of the package), a local model folder, or a hub id."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    data_dir: Path | None = None
    """Folder of the data sets. Default: a test bed is drawn into the run's folder."""
    from_scratch: tyro.conf.FlagCreatePairsOff[bool] = False
    """Measure accuracies too, on fewer questions, instead of using those in the repository."""
    smoke: tyro.conf.FlagCreatePairsOff[bool] = False
    """Run every step on a handful of samples and two epochs; the figures have no meaning."""
    repository: Path | None = None
    """Root of the checkout. Default: that of the package, or the current directory."""


def main(argv: list[str]) -> None:
    """Run the remaining steps, and print the table.

    Raises:
        UserError: invalid input, or a step failed.
    """
    flags = console.parse(Flags, argv, "reproduce", DESCRIPTION, EXAMPLES)
    checkout = find_checkout(flags.repository)
    import_experiments(checkout, "reproduce").main(flags, checkout)
