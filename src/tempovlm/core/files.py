"""Makes and holds the folder that a command writes its results to; `core.paths` writes the files."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tempovlm.core.errors import UserError
from tempovlm.core.locks import held


def make_folder(path: Path, flag: str = "output_dir") -> Path:
    """Make a folder with its parents; `flag` named it.

    Raises:
        UserError: it cannot be made or written to, or a file has its name.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--{flag} {path}: cannot be made ({error.strerror or error})") from None
    try:
        # Told now and not when there are results: that may be an hour away.
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"--{flag} {path}: cannot be written to ({error.strerror or error})") from None
    return path


@contextlib.contextmanager
def writing_to(path: Path, flag: str = "output_dir") -> Iterator[Path]:
    """Make a folder and hold it, so that the files of two runs are not mixed; `flag` named it.

    Raises:
        UserError: it cannot be made or written to, a file has its name, or another process holds it.
    """
    with held(make_folder(path, flag), flag):
        yield path
