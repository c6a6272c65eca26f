"""Parquet files of the laboratory: compressed tables as bytes, and tables and schemas read from files.

Needs the extra `experiments`, imported when a function is called.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempovlm.core.errors import UserError
from tempovlm.core.stamp import Stamp

if TYPE_CHECKING:
    import pyarrow as pa

STAMP_KEY, SCHEMA_KEY = b"tempovlm.stamp", b"tempovlm.schema"
"""Keys of a file's metadata."""


def labels(stamp: Stamp, schema: str) -> dict[bytes, bytes]:
    """Return the metadata that say where a file is from and what its rows are."""
    return {STAMP_KEY: json.dumps(stamp.to_json()).encode(), SCHEMA_KEY: schema.encode()}


def as_parquet(table: pa.Table, *, level: int = 19, **more: Any) -> bytes:
    """Return a table as a Parquet file, compressed with Zstandard at a level; `more` goes to pyarrow's writer."""
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", compression_level=level, **more)
    return buffer.getvalue()


def read_table(path: Path) -> pa.Table:
    """Read all columns of a Parquet file.

    Raises:
        UserError: the file is missing, empty or damaged.
    """
    import pyarrow.parquet as pq

    if not path.is_file():
        raise UserError(f"{path}: no such results file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    return _read(path, pq.read_table)


def read_schema(path: Path) -> pa.Schema:
    """Read the columns' names and types and the metadata of a Parquet file.

    Raises:
        UserError: the file is missing or damaged.
    """
    import pyarrow.parquet as pq

    return _read(path, pq.read_schema)


def _read(path: Path, read: Callable[[Any], Any]) -> Any:
    """Read a Parquet file, opened as a file: a path would add columns from folder names such as a=b."""
    import pyarrow as pa

    try:
        with path.open("rb") as file:
            return read(file)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: half-written or damaged, not a Parquet file ({reason})") from None
