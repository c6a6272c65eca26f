"""Where this program keeps what it measured and made, and how a file is written: whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from tempovlm.core.errors import UserError


def cache_dir() -> Path:
    """The user's cache directory for this program; it need not exist yet.

    `TEMPOVLM_CACHE_DIR` names it outright; otherwise it is `tempovlm` under `XDG_CACHE_HOME` or `~/.cache`.
    """
    named = os.environ.get("TEMPOVLM_CACHE_DIR")
    if named:
        return expanded(named)
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tempovlm"


def expanded(path: str | Path) -> Path:
    """The path with a leading `~` or `~user` replaced by that user's home folder.

    Raises:
        UserError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{path}: no such user, or no home folder; set HOME, or write the folder out in place of ~"
        ) from None


def is_there(path: Path, kind: Callable[[Path], bool]) -> bool:
    """Whether there is a path of a kind, such as `Path.is_dir`; False for a name that no file can have."""
    try:
        return kind(path)
    except OSError:
        return False


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its name at the end; folders are made, a failure leaves none.

    So `path` is whole or absent, whenever the process ends, and as readable as the user's other files.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    if not path.name:
        raise UserError(f"{str(path)!r}: names no file to write; add one")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_whole(path: Path, data: str | bytes) -> None:
    """Write text or bytes, whole or not at all.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    with whole(path) as part:
        part.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
