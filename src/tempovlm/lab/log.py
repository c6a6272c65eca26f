"""The log of a training: a JSON line for each epoch, and TensorBoard if it is installed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tempovlm.core.errors import UserError
from tempovlm.core.paths import write_whole

LOG = "training_log.jsonl"

Log = Callable[[Mapping[str, Any]], None]


def logged(folder: Path, epochs: int) -> list[dict[str, Any]]:
    """Return the first `epochs` records of an interrupted training; later epochs are trained again.

    Raises:
        UserError: the log is damaged.
    """
    path = folder / LOG
    if not epochs or not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:epochs]]
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); remove the folder to train anew") from None


@contextmanager
def training_log(folder: Path, before: Sequence[Mapping[str, Any]] = ()) -> Iterator[Log]:
    """Yield a function that logs an epoch's record; the file begins with those of the epochs `before`.

    The folder is one that the caller holds (`core.files.writing_to`).

    Raises:
        UserError: it cannot be written.
    """
    write_whole(folder / LOG, "".join(json.dumps(record) + "\n" for record in before))
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        board = None
    else:
        board = SummaryWriter(str(folder / "tensorboard"), purge_step=len(before) + 1)
    with (folder / LOG).open("a", encoding="utf-8") as file:

        def log(record: Mapping[str, Any]) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()
            if board is not None:
                for name, value in _scalars(record):
                    board.add_scalar(name, value, record["epoch"])

        try:
            yield log
        finally:
            if board is not None:
                board.close()


def _scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Return every number with its path as a name."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif name != "epoch" and isinstance(value, (int, float)):
            yield prefix + name, value
