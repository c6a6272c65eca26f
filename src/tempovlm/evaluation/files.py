"""The folder that a command's results go to. How files are written into it: `core.paths`."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tempovlm.core.errors import UserError


def make_folder(path: Path, flag: str = "output_dir") -> Path:
    """The folder, made with its parents; `flag` named it.

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
