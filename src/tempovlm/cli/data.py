"""`tempovlm data`: make, check and download data sets.

The work is done in `tempovlm.testbed` and `tempovlm.data`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tempovlm.cli import console
from tempovlm.core.errors import UserError
from tempovlm.core.paths import expanded
from tempovlm.data.own import describe
from tempovlm.data.registry import DATASETS, GENERATED, SCORED_TOGETHER, find, find_own

_KNOWN = f"Data set: one of {', '.join(DATASETS)}; or a file of your own questions (.csv, .jsonl, .parquet)."

_ON_THE_HUB = f"Data set with a copy on the hub: {', '.join(name for name, one in DATASETS.items() if one.hub)}."

_EXAMPLES = {
    "make": ("tempovlm data make --output_dir /tmp/bed --num_train 100 --num_val 50",),
    "check": (
        "tempovlm data check okvqa",
        "tempovlm data check coco_caption --data_dir /data",
        "tempovlm data check my.csv",
    ),
    "download": ("tempovlm data download text_vqa", "tempovlm data download doc_qa --split val --data_dir /data"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MakeFlags:
    """Flags of `tempovlm data make`."""

    output_dir: Annotated[Path, tyro.conf.arg(aliases=("--out",))]
    """Folder to make; it must not exist, or be empty."""
    num_train: int = 2000
    """Training pictures of each data set."""
    num_val: int = 750
    """Validation pictures of each data set; each also gets a twin."""
    seed: int = 0
    """The same seed draws the same files."""


@dataclass(frozen=True, slots=True)
class CheckFlags:
    """Flags of `tempovlm data check`."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help=_KNOWN)]
    data_dir: Path | None = None
    """Folder that contains the data sets' folders. Default: TEMPOVLM_DATA_DIR, else your cache directory."""


@dataclass(frozen=True, slots=True)
class DownloadFlags:
    """Flags of `tempovlm data download`."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help=_ON_THE_HUB)]
    split: Literal["train", "val"] = "val"
    """Split: questions for training or for validation."""
    data_dir: Path | None = None
    """Folder that contains the data sets' folders. Default: TEMPOVLM_DATA_DIR, else your cache directory."""


def make(argv: list[str]) -> None:
    """Draw pictures and questions that stand in for TextVQA, VQAv2, OK-VQA and ScienceQA."""
    flags = _parse(MakeFlags, "make", argv, make)
    from tempovlm.testbed.make import make_testbed

    folder = make_testbed(flags.output_dir, flags.num_train, flags.num_val, flags.seed, datasets=GENERATED)
    sys.stderr.write(f"made a synthetic test bed in {folder} (use it with --data_dir {folder})\n")


def check(argv: list[str]) -> None:
    """Print which files of a data set exist, which are missing and where to get them."""
    flags = _parse(CheckFlags, "check", argv, check)
    from tempovlm.data import sources

    if (own := find_own(flags.name)) is not None:
        splits = Counter(sample.split for sample in own.samples)
        pictures, styles = (len({s.image_id for s in own.samples}), sorted({s.style for s in own.samples}))
        counts = ", ".join(f"{split} {count}" for split, count in splits.items())
        lines = [f"{own.path}: complete ({own.digest})", f"{own.count} about {pictures} pictures: {counts}"]
        lines += [f"style {', '.join(styles)}", describe(own.samples)]
        sys.stdout.write("\n".join((*lines, "")))
        return
    root = _root(flags.data_dir)
    dataset, reports = find(flags.name), sources.check(flags.name, root)
    folder, copy = root / flags.name, dataset.hub
    lines = [f"{flags.name}: {dataset.home}", f"sought in {folder}"]
    for report in reports:
        state = "complete" if not report.missing else f"{len(report.missing)} missing"
        lines.append(f"{report.split} ({report.kind}): {state}")
        lines += [f"  there    {_within(path, folder)}" for path in report.present]
        lines += [f"  missing  {' or '.join(need.paths)}\n           from {need.url}" for need in report.missing]
        if report.missing and copy is not None and report.split in copy.patterns:
            place = f"huggingface.co/datasets/{copy.repo_id}, {copy.patterns[report.split]}"
            lines.append(f"  instead  tempovlm data download {flags.name} --split {report.split}  ({place})")
    lines.append(f"asked by {_asked_by(flags.name, flags.data_dir)}")
    sys.stdout.write("\n".join((*lines, "")))
    if all(report.missing for report in reports):
        raise UserError(f"{flags.name}: no split is complete in {folder}")


def download(argv: list[str]) -> None:
    """Download a data set from the hub; existing files are kept, partial ones continued."""
    flags = _parse(DownloadFlags, "download", argv, download)
    from tempovlm.data import sources

    note = console.stderr().print
    folder = sources.download(flags.name, flags.split, _root(flags.data_dir), note)
    note(f"{flags.name} {flags.split} is in {folder}; asked by {_asked_by(flags.name, flags.data_dir)}")


def _asked_by(name: str, data_dir: Path | None) -> str:
    """Return the commands that ask a data set's questions."""
    bench = f"tempovlm bench --dataset {name}" + (f" --data_dir {data_dir}" if data_dir else "")
    return f"{bench}, and by {'Exp 8' if name in SCORED_TOGETHER else 'the core experiment and Exp 6, 7 and 8'}"


def _parse(flags: type[console.Flags], name: str, argv: list[str], command: Callable[..., None]) -> console.Flags:
    return console.parse(flags, argv, f"data {name}", command.__doc__ or "", _EXAMPLES[name])


def _root(data_dir: Path | None) -> Path:
    from tempovlm.data.catalog import default_data_dir

    return default_data_dir() if data_dir is None else expanded(data_dir)


def _within(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


_COMMANDS: dict[str, Callable[[list[str]], None]] = {"make": make, "check": check, "download": download}


def main(argv: list[str]) -> None:
    """Run `tempovlm data …`.

    Args:
        argv: Words after `data` on the command line.

    Raises:
        UserError: Unknown command, or an error of the command itself.
    """
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:<8}  {(command.__doc__ or '').splitlines()[0]}" for name, command in _COMMANDS.items()]
        examples = [f"  {examples[0]}" for examples in _EXAMPLES.values()]
        text = ("usage: tempovlm data COMMAND [--help]", "", *lines, "", "examples:", *examples, "")
        sys.stdout.write("\n".join(text))
        return
    name, *rest = argv
    if name not in _COMMANDS:
        raise UserError(f"unknown command 'data {name}'; choose one of {', '.join(_COMMANDS)}")
    _COMMANDS[name](rest)
