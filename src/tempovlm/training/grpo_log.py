"""The log of a GRPO training: a JSON line an epoch, and TensorBoard where it is installed. Knows no training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tempovlm.evaluation.files import write_atomic
from tempovlm.training.controller_loop import LOG

Log = Callable[[Mapping[str, Any]], None]


@contextmanager
def training_log(folder: Path, epoch: int) -> Iterator[tuple[Log, list[Mapping[str, Any]]]]:
    """Yields a function that logs an epoch as a JSON line and to TensorBoard, where installed, and a history.

    Lines of epochs after `epoch`, which an interrupted training left, are dropped first.
    """
    path = folder / LOG
    history: list[Mapping[str, Any]] = []
    if epoch and path.is_file():
        # One record an epoch: what is beyond the state, whole or half-written, is trained again.
        history += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:epoch]]
    write_atomic(path, "".join(json.dumps(record) + "\n" for record in history))
    board: Any = None
    try:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(folder / "tensorboard"), purge_step=epoch + 1)
    except ImportError:
        pass
    with path.open("a", encoding="utf-8") as file:

        def log(record: Mapping[str, Any]) -> None:
            history.append(record)
            file.write(json.dumps(record) + "\n")
            file.flush()
            for name, value in _scalars(record):
                if board is not None:
                    board.add_scalar(name, value, record["epoch"])

        try:
            yield log, history
        finally:
            if board is not None:
                board.close()


def _scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number with its path as a name."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif name != "epoch":
            yield prefix + name, value
