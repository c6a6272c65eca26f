"""`tempovlm report`: the table of targets and measured figures, made from the repository's result files.

The code is in the checkout's `experiments/scoreboard`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from tempovlm.cli import console
from tempovlm.cli.checkout import find_checkout, import_experiments
from tempovlm.core.paths import write_whole

DESCRIPTION = """\
Write docs/results.md and docs/results.json from the stamped result files of a repository, and from nothing else.

Every promised figure is listed: measured and met, measured and missed, or not measured yet with the command that
makes it. Nothing is measured by this command, and no figure is filled in."""

EXAMPLES = (
    "tempovlm report",
    "tempovlm report --check",
    "tempovlm report --repository ../TempoVLM",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """Flags of `tempovlm report`."""

    repository: Path = Path()
    """Root of the repository."""
    check: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write nothing; exit with 1 if the files differ from what would be written."""


def main(argv: list[str]) -> None:
    """Write the files, or compare them.

    Raises:
        UserError: this is not a repository of the project, or one of its result files is broken.
        SystemExit: with 1, if `--check` finds a difference.
    """
    flags = console.parse(Flags, argv, "report", DESCRIPTION, EXAMPLES)
    checkout = find_checkout(flags.repository)
    texts: dict[str, str] = import_experiments(checkout, "scoreboard.report").build(flags.repository)
    if flags.check:
        stale = [path for path, text in texts.items() if not _is_same(flags.repository / path, text)]
        if stale:
            sys.stderr.write(f"tempovlm report: {' and '.join(stale)}: out of date; run tempovlm report\n")
            raise SystemExit(1)
        sys.stdout.write(f"{' and '.join(texts)} are up to date\n")
        return
    for path, text in texts.items():
        write_whole(flags.repository / path, text)
        sys.stdout.write(f"{flags.repository / path}\n")


def _is_same(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode("utf-8")
