"""The cache directory, and reading and writing of files.

Files are written atomically. An unreadable file raises an error of one line.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tempovlm.core.errors import UserError

_LONGEST = 40
"""Characters of a file's name that its scratch file repeats, since names are limited to 255 bytes."""


def cache_dir() -> Path:
    """Return the user's cache directory for this program; it need not exist yet.

    `TEMPOVLM_CACHE_DIR` sets it; the default is `tempovlm` under `XDG_CACHE_HOME` or `~/.cache`.
    """
    named = os.environ.get("TEMPOVLM_CACHE_DIR")
    if named:
        return expanded(named)
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tempovlm"


def expanded(path: str | Path) -> Path:
    """Return the path with a leading `~` or `~user` replaced by that user's home folder.

    Raises:
        UserError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{path}: no such user, or no home folder; set HOME, or write the folder out in place of ~"
        ) from None


def exists_as(path: Path, kind: Callable[[Path], bool]) -> bool:
    """Call a check such as `Path.is_dir`; False for a name that no file can have."""
    try:
        return kind(path)
    except OSError:
        return False


def _beside(path: Path, suffix: str) -> Path:
    """Return a name in the same folder that no other thread, process or container uses."""
    return path.with_name(f".{path.name[:_LONGEST]}.{os.getpid()}-{secrets.token_hex(4)}.{suffix}")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a scratch file that is renamed to `path` at the end; makes folders, and removes it after a failure.

    So `path` is whole or absent, whenever the process ends, and as readable as the user's other files.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    if not path.name:
        raise UserError(f"{str(path)!r}: is not a file name; add one")
    part = _beside(path, "part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Yield a scratch folder beside `target`, to fill and to rename or move from; removed at the end.

    Also removes folders that killed processes left there. A lock, which ends with its process, tells them from
    those in use.

    Raises:
        OSError: the folder cannot be made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name[:_LONGEST]}.partial-"
    for path in target.parent.iterdir():
        if re.fullmatch(re.escape(prefix) + r"\w{8}", path.name):
            _remove_if_left(path)
    path, handle = _make_locked(prefix, target.parent)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(handle)


def _make_locked(prefix: str, parent: Path) -> tuple[Path, int]:
    """Return a new folder and a handle that locks it, as far as the file system has locks."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(path, os.O_RDONLY)
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            if path.exists():  # another process may have taken it for a leftover before it was locked
                return path, handle
            os.close(handle)


def _remove_if_left(path: Path) -> None:
    """Remove a scratch folder that no process holds; any other path stays."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(handle)


def write_if_absent(path: Path, data: str) -> bool:
    """Write text atomically unless the file exists; return whether it was written.

    If several processes do this at once, one writes; on a file system without links, the last one.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    scratch = _beside(path, "whole")
    write_whole(scratch, data)
    try:
        os.link(scratch, path)
    except FileExistsError:
        return False
    except OSError:
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return True


def write_whole(path: Path, data: str | bytes) -> None:
    """Write text or bytes atomically.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    with whole(path) as part:
        part.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def is_there(path: Path) -> bool:
    """Whether the name exists, also as a folder or a broken link."""
    return os.path.lexists(path)


def check_file(path: Path, remedy: str) -> None:
    """Check that a path is a readable file with its content.

    Args:
        path: the file.
        remedy: end of the message.

    Raises:
        UserError: the file is missing, a broken link, a folder, not readable, or a git-LFS pointer.
    """
    try:
        if path.is_dir():
            raise UserError(f"{path}: a folder, where a file should be; {remedy}")
        if not path.is_file():
            raise UserError(f"{path}: {_why_absent(path)}; {remedy}")
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {remedy}") from None
    if start == _LFS_POINTER:
        raise UserError(f"{path}: a git-LFS pointer instead of the file; run git lfs pull, or {remedy}")


def _why_absent(path: Path) -> str:
    if path.is_symlink():
        return f"a link to {path.readlink()}, which is missing"
    return "not a file" if is_there(path) else "missing"


def read_json(path: Path, remedy: str, make_object: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Return the content of a JSON file.

    Args:
        path: the file.
        remedy: end of the message.
        make_object: makes an object of its fields, or raises a `ValueError`. Default: a dictionary.

    Raises:
        UserError: the file cannot be read, or is not JSON.
    """
    check_file(path, remedy)
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=make_object)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); {remedy}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {remedy}") from None
