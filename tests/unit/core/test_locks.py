"""Folders and files that one process holds at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from pathlib import Path

import pytest

from tempovlm.core.errors import UserError
from tempovlm.core.files import is_marked, marked, writing_to


def test_a_folder_is_free_again_while_a_child_forked_meanwhile_lives(tmp_path: Path) -> None:
    with writing_to(tmp_path):
        child = os.fork()
        if child == 0:
            signal.pause()
        with pytest.raises(UserError, match="another process is writing results there"), writing_to(tmp_path):
            pass
    try:
        with writing_to(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_mark_is_seen_while_it_lasts(tmp_path: Path) -> None:
    path = tmp_path / "mark"
    path.touch()
    assert not is_marked(path)
    with marked(path):
        assert is_marked(path)
    assert not is_marked(path)


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(UserError, match=r"--output_dir .*: cannot be locked .*use a local directory"),
        writing_to(tmp_path),
    ):
        pass
