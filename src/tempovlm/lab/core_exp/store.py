"""Read and write results of the core experiment: one Parquet file for each data set, or the older JSON layout.

Every consumer reads through `read_results`: it reads both layouts, checks the rows, and reports in one
line which file and field is wrong. Needs the extra `experiments`, imported when a function is called.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobSpace
from tempovlm.core.paths import write_whole
from tempovlm.core.records import COLUMNS, REPEAT_FIELDS, TIME_FIELDS, SweepRow
from tempovlm.core.stamp import Stamp
from tempovlm.data.registry import DATASETS, check_datasets, is_known
from tempovlm.lab.core_exp import legacy
from tempovlm.lab.core_exp.checks import check_rows
from tempovlm.lab.core_exp.parquet import STAMP_KEY, as_parquet, labels, read_schema, read_table
from tempovlm.lab.core_exp.questions import check_directories, has_questions

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SCHEMA = "tempovlm.core_exp/1"
PARTS = ".parts"
"""Folder of an unfinished sweep, within its output directory."""

_TEXTS = ("dataset", "split", "question_id", "image_id", "template", "tier", "prediction", "error")


def write_rows(folder: Path, dataset: str, rows: Iterable[SweepRow], stamp: Stamp) -> Path:
    """Write `{folder}/{dataset}.parquet` atomically and return its path.

    Raises:
        UserError: the folder cannot be written.
    """
    import pyarrow as pa

    schema = _schema().with_metadata(labels(stamp, SCHEMA))
    table = pa.Table.from_pylist([row.to_json() for row in rows], schema=schema)
    path = folder / f"{dataset}.parquet"
    write_whole(path, as_parquet(table, level=9))
    return path


def read_rows(path: Path) -> tuple[list[SweepRow], Stamp]:
    """Read the rows of one Parquet file, as they were written, and their stamp.

    Raises:
        UserError: the file is missing, damaged, or not of this kind.
    """
    table = _read_table(path)
    rows = [SweepRow.from_json(record, str(path)) for record in table.to_pylist()]
    return rows, _stamp_of(table.schema, path)


def read_stamp(path: Path) -> Stamp:
    """Read the stamp of one Parquet file and none of its rows.

    Raises:
        UserError: the file is missing, damaged, or has no stamp.
    """
    return _stamp_of(read_schema(path), path)


class Stamps(dict[str, dict[str, Any] | None]):
    """Stamps by file: one object, though pandas copies it with each column and part that it takes of a table."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Stamps:
        return self


def read_results(
    results_dirs: Sequence[Path], datasets: Sequence[str] | None = None, space: KnobSpace | None = None
) -> pd.DataFrame:
    """Read and check all rows of one or several results directories.

    Args:
        results_dirs: each with a Parquet file or a folder of JSON files for each data set.
        datasets: data sets to read; None reads all. Each must be in one directory at least.
        space: the model's legal settings; rows outside, and files of another fingerprint, are refused.

    Returns:
        The columns of `SweepRow` and `source`, the directory as given. Whole numbers of a column with gaps are
        floats. `attrs["stamps"]` holds the stamp of each file as a JSON object (None for the predecessor's
        files, which have none). Failed samples are among the rows, with `error` set.

    Raises:
        UserError: something is missing, damaged or does not fit; names file and field.
    """
    import pandas as pd

    datasets = None if datasets is None else check_datasets(datasets, "dataset_names")
    if not results_dirs:
        raise UserError("--results_dir: name at least one results directory")
    frames: list[pd.DataFrame] = []
    stamps = Stamps()
    found: set[str] = set()
    folders = list(dict.fromkeys(map(Path, results_dirs)))
    check_directories(folders)
    for folder in folders:
        for dataset, path in sorted(results_files(folder).items()):
            if datasets is None or dataset in datasets:
                frame, stamps[str(path)] = _read_checked(path, dataset, space)
                frames.append(frame.assign(source=str(folder)))
                found.add(dataset)
    if missing := [name for name in datasets or () if name not in found]:
        where = ", ".join(map(str, results_dirs))
        raise UserError(f"{where}: no results of {missing[0]} (neither {missing[0]}.parquet nor a JSON folder)")
    result = pd.concat(frames, ignore_index=True)
    result.attrs = {"stamps": stamps}
    return result


def results_files(folder: Path) -> dict[str, Path]:
    """Map each data set to its Parquet file, else to its folder of JSON files.

    Raises:
        UserError: no such directory, or it holds no results.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such results directory")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and any(path.glob(legacy.PATTERN)):
            found[_known(path.name.replace("-", "_"), path)] = path
        elif path.suffix == ".parquet":
            found[_known(path.stem, path)] = path
    if not found:
        is_half = (folder / PARTS).is_dir()
        hint = "its sweep is not finished: run it again, it resumes" if is_half else "holds no results"
        raise UserError(f"{folder}: {hint} (looked for DATASET.parquet and DATASET/*.json)")
    return found


def _known(name: str, path: Path) -> str:
    """The name, if it is a data set's, or that of your own questions, named or told by the folder's manifest."""
    if not is_known(name) and not has_questions(path.parent, name):
        raise UserError(f"{path}: unknown data set {name!r}; choose from {', '.join(DATASETS)}")
    return name


def _read_checked(path: Path, dataset: str, space: KnobSpace | None) -> tuple[pd.DataFrame, dict[str, Any] | None]:
    """Read and check the rows and the stamp of a file or a folder."""
    import pandas as pd

    if path.is_dir():
        parts = [legacy.read_file(file, dataset) for file in sorted(path.glob(legacy.PATTERN))]
        records = [{name: getattr(row, name) for name in COLUMNS} for part in parts for row in part.rows]
        frame = pd.DataFrame(records, columns=list(COLUMNS))
        for name in (*TIME_FIELDS, "accuracy"):
            frame[name] = frame[name].astype(float)
        stamp = next((part.stamp for part in parts if part.stamp is not None), None)
        _check_stamps([part.stamp for part in parts], path, space)
        _check_same([part.stamp for part in parts], path)
    else:
        table = _read_table(path)
        stamp = _stamp_of(table.schema, path).to_json()
        _check_stamps([stamp], path, space)
        frame = table.to_pandas()
        frame["repeats"] = [_whole(value) for value in frame["repeats"]]
        frame["tiling"] = [None if value is None else tuple(map(int, value.tolist())) for value in frame["tiling"]]
        frame["step_ms"] = [None if v is None else tuple(map(tuple, v)) for v in frame["step_ms"]]
    if frame.empty:
        raise UserError(f"{path}: holds no rows")
    check_rows(frame, path, dataset, space)
    return frame, stamp


def _whole(repeats: dict[str, Any] | None) -> dict[str, tuple[float, ...]] | None:
    """Turn arrays into tuples of numbers, and leave out names without a measurement."""
    if repeats is None:
        return None
    return {name: tuple(map(float, laps.tolist())) for name, laps in repeats.items() if laps is not None}


def _check_stamps(stamps: Iterable[dict[str, Any] | None], path: Path, space: KnobSpace | None) -> None:
    for stamp in stamps:
        if stamp is not None and space is not None and stamp["knob_space"] != space.fingerprint:
            raise UserError(
                f"{path}: field knob_space of its stamp is {stamp['knob_space']}, this model's is "
                f"{space.fingerprint}: the results are of another knob space"
            )


def _check_same(stamps: Iterable[dict[str, Any] | None], path: Path) -> None:
    known = [stamp for stamp in stamps if stamp is not None]
    for name in ("hardware", "device", "weights", "knob_space"):
        if len({str(stamp[name]) for stamp in known}) > 1:
            raise UserError(f"{path}: field {name} of its files' stamps differs; give results of one")


def _read_table(path: Path) -> pa.Table:
    import pyarrow as pa

    table = read_table(path)
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise UserError(f"{path}: no column {missing[0]}")
    try:
        return table.select(list(COLUMNS)).cast(_schema().with_metadata(table.schema.metadata))
    except (pa.ArrowException, ValueError) as error:
        raise UserError(f"{path}: a column has the wrong type ({str(error).splitlines()[0]})") from None


def _stamp_of(schema: pa.Schema, path: Path) -> Stamp:
    text = (schema.metadata or {}).get(STAMP_KEY)
    if text is None:
        raise UserError(f"{path}: field {STAMP_KEY.decode()} is missing from its metadata: of unknown origin")
    try:
        return Stamp.from_json(json.loads(text))
    except (ValueError, TypeError, UserError) as error:
        raise UserError(f"{path}: field {STAMP_KEY.decode()} of its metadata: {error}") from None


def _schema() -> pa.Schema:
    import pyarrow as pa

    number, count = pa.float64(), pa.int64()
    laps = pa.list_(number)
    special = {
        "tiling": pa.list_(count),
        "repeats": pa.struct([(name, laps) for name in REPEAT_FIELDS]),
        "step_ms": pa.list_(laps),
        **dict.fromkeys((*TIME_FIELDS, "accuracy"), number),
        **dict.fromkeys(_TEXTS, pa.string()),
    }
    return pa.schema([(name, special.get(name, count)) for name in COLUMNS])
