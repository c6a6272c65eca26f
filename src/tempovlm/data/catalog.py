"""Find a data set and draw samples from it; make the generated test bed if there is none."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random

from tempovlm.core.errors import UserError
from tempovlm.core.paths import expanded, scratch_folder
from tempovlm.data.dataset import SPLITS, DataSet
from tempovlm.data.files import is_generated
from tempovlm.data.parquet import ParquetSet
from tempovlm.data.registry import GENERATED, find, find_own
from tempovlm.data.sample import Sample, check_unique
from tempovlm.testbed import EDITION, NOTICE
from tempovlm.testbed.bed import Bed

DATA_DIR_VARIABLE = "TEMPOVLM_DATA_DIR"

_BEDS = "beds"
"""Folder within the default one for test beds that results name."""

_SMALL = (64, 160)
"""Training and validation pictures of each data set in a test bed that is made automatically."""


def default_data_dir() -> Path:
    """Return the default folder of data sets: $TEMPOVLM_DATA_DIR, else `tempovlm/data` in the user's cache."""
    named = os.environ.get(DATA_DIR_VARIABLE)
    if named:
        return expanded(named)
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tempovlm" / "data"


def load_samples(
    dataset: str,
    split: str = "val",
    *,
    data_dir: str | Path | None = None,
    num_samples: int | None = None,
    seed: int = 0,
) -> list[Sample]:
    """Read a data set.

    Args:
        dataset: One of `registry.DATASETS`.
        split: 'train' or 'val'; TallyQA has no validation questions, so its 'val' means its test questions.
        data_dir: Folder that contains the data sets' folders. Default: `default_data_dir()`, with a small
            generated test bed made there if the data set is missing and has a stand-in.
        num_samples: Number of samples, drawn with `seed`; a smaller draw is the beginning of a larger one. None
            reads all, in file order.
        seed: Seed of the draw.

    Returns:
        The samples; fewer than `num_samples` if the data set has fewer.

    Raises:
        UserError: Unknown data set or split, missing or damaged files, or questions that share an id.
    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; choose train or val")
    if num_samples is not None and num_samples < 1:
        raise UserError(f"num_samples must be 1 or more, got {num_samples}")
    if (own := find_own(dataset)) is not None:
        samples = own.of(split)
        return own.extract([samples[index] for index in _draw(len(samples), num_samples, seed)])
    known = find(dataset)
    root = default_data_dir() if data_dir is None else expanded(data_dir)
    if data_dir is None and dataset in GENERATED:
        root = _small_bed(root, dataset)
    folder = root / dataset
    if not folder.is_dir():
        made = f"make one: tempovlm data make --output_dir {root}, or " if dataset in GENERATED else ""
        get = f"see tempovlm data check {dataset} for where to get it ({known.home})"
        raise UserError(f"no folder {folder} for data set {dataset}; {made}{get}")
    try:
        table = ParquetSet.find(known, folder, split)
        samples = _read(known, folder, split) if table is None else table.samples
    except UserError:
        raise
    except FileNotFoundError as error:
        hint = f"tempovlm data check {dataset} says where to get it"
        raise UserError(f"data set {dataset}: {error.filename} is missing; {hint}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"data set {dataset}: the files in {folder} cannot be read ({error!r})") from error
    if not samples:
        raise UserError(f"data set {dataset} has no {split} samples in {folder}")
    files = table.files if table else [_questions_file(known, folder, split)] * len(samples)
    check_unique([sample.question_id for sample in samples], files)
    order = _draw(len(samples), num_samples, seed)
    return [samples[index] for index in order] if table is None else table.extract(order)


def _draw(total: int, num_samples: int | None, seed: int) -> list[int]:
    """The places of the samples that are drawn; all of them, in order, where no number is given."""
    order = list(range(total))
    if num_samples is not None:
        Random(seed).shuffle(order)
    return order[:num_samples]


def _read(dataset: DataSet, folder: Path, split: str) -> list[Sample]:
    """Return all samples of a split, from files in the official format."""
    source = "synthetic" if is_generated(folder) else "official"
    found = dataset.read(folder, split)
    return [
        Sample(**fields, style=dataset.style, dataset=dataset.name, split=split, data_source=source)
        for fields in found
    ]


def _questions_file(dataset: DataSet, folder: Path, split: str) -> Path:
    """Return the file that the ids of a split come from."""
    places = [folder / name for name in dataset.needs(split)[0].paths]
    return next((place for place in places if place.is_file()), places[0])


def load_mixed(
    datasets: Sequence[str], num_samples: int, *, data_dir: str | Path | None = None, seed: int = 0
) -> list[Sample]:
    """Return `num_samples` validation questions of several data sets in turn; the rest as `load_samples`."""
    counts = [len(range(i, num_samples, len(datasets))) for i in range(len(datasets))]
    columns = [
        load_samples(name, "val", data_dir=data_dir, num_samples=count, seed=seed)
        for name, count in zip(datasets, counts, strict=True)
        if count
    ]
    longest = max(len(column) for column in columns)
    return [column[i] for i in range(longest) for column in columns if i < len(column)]


def bed_of(datasets: Iterable[str], data_dir: str | Path | None = None) -> Bed | None:
    """Return what the test bed of some data sets, which are there, was drawn from; None for any other data.

    Args:
        datasets: names, as `load_samples` takes them.
        data_dir: the folder that they were read from, as there.
    """
    root = default_data_dir() if data_dir is None else expanded(data_dir)
    names = [name for name in datasets if find_own(name) is None]
    places = {name: Path() if data_dir is not None else _place_of_small(root, name) for name in names}
    if data_dir is None and not all((root / place / name).is_dir() for name, place in places.items()):
        root = _temporary_root()
    found = {Bed.read(root / place / name) for name, place in places.items()}
    return found.pop() if len(found) == 1 else None


def folder_of(bed: Bed) -> Path:
    """Return a folder with the pictures of a test bed: the default one if it has them, else one within it.

    There it is drawn if it is missing.

    Raises:
        UserError: it is of another edition than this version draws, or the folder cannot be written.
    """
    root = default_data_dir()
    there = [Bed.read(root / name) for name in GENERATED]
    if all(one is not None and one.covers(bed) for one in there):
        return root
    place = Path(_BEDS) / bed.name
    lacking = next((name for name in GENERATED if not (root / place / name).is_dir()), GENERATED[0])
    if bed.edition != EDITION and not (root / place).is_dir():
        raise UserError(
            f"the results are about edition {bed.edition} of the test bed, this version draws edition {EDITION}; "
            "give the folder with their pictures by --data_dir, or measure anew"
        )
    told = "drawing the synthetic test bed that the results are about"
    return _made_if_missing(root, lacking, bed, place, told)


def _small_bed(root: Path, dataset: str) -> Path:
    """Return the folder that `_made_if_missing` makes of a small test bed."""
    told = "no data sets: drawing a small synthetic test bed"
    return _made_if_missing(root, dataset, _small(), _place_of_small(root, dataset), told)


def _small() -> Bed:
    """Return the test bed that is drawn where nobody made one."""
    train, val = _SMALL
    return Bed(num_train=train, num_val=val)


def _place_of_small(root: Path, dataset: str) -> Path:
    """Return where a small test bed is in the default folder: its root, or beside pictures of another edition."""
    there = Bed.read(root / dataset)
    return Path() if there is None or there.edition == EDITION else Path(_BEDS) / _small().name


def _made_if_missing(root: Path, dataset: str, bed: Bed, place: Path, told: str) -> Path:
    """Return a place in a folder, or in a temporary one if it cannot be written, with the data set in it."""
    if (root / place / dataset).is_dir():
        return root / place
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        root = _temporary_root()
        sys.stderr.write(f"warning: the data folder cannot be written ({error.strerror}); using {root}\n")
    if not (root / place / dataset).is_dir():
        sys.stderr.write(f"{told} in {root / place} (once)\n")
        _make(root / place, bed)
    return root / place


def _temporary_root() -> Path:
    """Return this user's own folder among the temporary files, the same in every process."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    root = Path(tempfile.gettempdir()) / f"tempovlm-{user}"
    root.mkdir(mode=0o700, exist_ok=True)
    if root.is_symlink() or (hasattr(os, "getuid") and root.stat().st_uid != user):
        return Path(tempfile.mkdtemp(prefix="tempovlm-"))
    return root


def _make(root: Path, bed: Bed) -> None:
    """Make the test bed beside its place, then move in the missing parts.

    Every move is atomic and never replaces a folder, so two processes that do this at once end with one whole
    test bed.
    """
    from tempovlm.testbed.make import make_testbed

    root.mkdir(parents=True, exist_ok=True)
    with scratch_folder(root / "data") as scratch:
        made = make_testbed(scratch / "data", bed.num_train, bed.num_val, bed.seed, datasets=GENERATED)
        for dataset in GENERATED:
            target = root / dataset
            try:
                if not target.exists():
                    (made / dataset).rename(target)
            except OSError as error:
                if not target.is_dir():
                    raise UserError(f"cannot make the test bed in {root}: {error.strerror}") from error
        shutil.copyfile(made / NOTICE, scratch / NOTICE)
        (scratch / NOTICE).replace(root / NOTICE)
