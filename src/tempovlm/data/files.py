"""Read the JSON files of data sets and find their pictures; a missing one raises a `FileNotFoundError`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tempovlm.core.errors import UserError
from tempovlm.data.entries import Entry
from tempovlm.data.sample import check_unique
from tempovlm.testbed import NOTICE


def read_json(path: Path, *, keyed_by_id: bool = False) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        keyed_by_id: Whether keys are ids, which must be unique; JSON readers would keep the last one.

    Raises:
        UserError: It is damaged, or a key is a duplicate.
    """
    last: list[str] = []

    def keep_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        last[:] = [key for key, _ in pairs]
        return dict(pairs)

    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=keep_keys if keyed_by_id else None)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: half-written or damaged, not a JSON file ({error}); get it again") from None
    check_unique(last, [path] * len(last))  # of the outermost object, which is read last
    return content


def read_fields(path: Path, *, keyed_by_id: bool = False) -> Entry:
    """Read a JSON file that contains an object; else as `read_json`."""
    content = read_json(path, keyed_by_id=keyed_by_id)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object; get the file again")
    return Entry(content, path, "the file")


def listed(content: Entry, field: str, key: str, word: str = "question") -> list[Entry]:
    """Return the entries of a list in a file, each named in messages by its id, the field `key`."""
    return list(Entry.each(content.value(field), content.path, key, word))


def is_generated(folder: Path) -> bool:
    """Whether a folder contains generated data."""
    return (folder / NOTICE).is_file()


def first(*paths: Path) -> Path:
    """Return the first of several places that exists."""
    for path in paths:
        if path.exists():
            return path
    raise FileNotFoundError(2, "missing", str(paths[0]))


def pictures(folder: Path, name: str) -> Path:
    """Return the folder of the pictures."""
    path = folder / name
    if not path.is_dir():
        raise FileNotFoundError(2, "missing", str(path))
    return path


def twin(folder: Path, name: str) -> Path | None:
    """Return the same scene drawn again, which generated data has for each validation picture."""
    path = folder / "twins" / name
    return path if path.is_file() else None
