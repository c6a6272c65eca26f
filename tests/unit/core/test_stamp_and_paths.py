from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tempovlm.core import paths
from tempovlm.core.errors import UserError
from tempovlm.core.paths import cache_dir, scratch_folder, write_whole
from tempovlm.core.stamp import Stamp

STAMP = Stamp(**{field.name: field.name for field in fields(Stamp)})  # type: ignore[arg-type]


def test_stamp_round_trip() -> None:
    record = STAMP.to_json()
    assert Stamp.from_json({**record, "field of another version": 1}) == STAMP
    record.pop("weights")
    with pytest.raises(UserError, match="weights"):
        Stamp.from_json(record)


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TEMPOVLM_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "tempovlm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "tempovlm"
    monkeypatch.setenv("TEMPOVLM_CACHE_DIR", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    assert not cache_dir().exists()


def test_a_home_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPOVLM_CACHE_DIR", "~nobody-of-that-name/cache")
    with pytest.raises(UserError, match="~nobody-of-that-name/cache: no such user"):
        cache_dir()


def test_a_path_without_a_name_is_told() -> None:
    with pytest.raises(UserError, match="is not a file name"):
        write_whole(Path(), "content")


def test_a_file_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "file.json"
    write_whole(path, "old")
    write_whole(path, "whole")

    def interrupted(*_: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "half")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_threads_that_write_one_file_leave_it_whole(tmp_path: Path) -> None:
    path, texts = tmp_path / "shared.txt", {letter: letter * 200_000 for letter in "abcd"}

    def write_and_read(letter: str) -> set[str]:
        seen = set()
        for _ in range(20):
            write_whole(path, texts[letter])
            seen.add(path.read_text())
        return seen

    with ThreadPoolExecutor(4) as pool:
        seen = set().union(*pool.map(write_and_read, texts))
    assert seen <= set(texts.values())
    assert [one.name for one in tmp_path.iterdir()] == ["shared.txt"]


@pytest.mark.parametrize("letter", ["a", "画"])
def test_a_file_with_a_long_name_is_written(letter: str, tmp_path: Path) -> None:
    path = tmp_path / (letter * (240 // len(letter.encode())))
    write_whole(path, "whole")
    assert path.read_text() == "whole"


def left_by_a_killed_process(target: Path) -> Path:
    """A scratch folder whose process died while it filled it."""
    script = """
        import os, signal, sys
        from pathlib import Path
        from tempovlm.core.paths import scratch_folder
        with scratch_folder(Path(sys.argv[1])) as folder:
            (folder / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = target.parent.glob(f".{target.name}.partial-*")
    return left


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "data"
    left = left_by_a_killed_process(target)
    (tmp_path / ".data.partial-notes.txt").write_text("the user's")
    (tmp_path / ".data.partial-a1b2c3d4").write_text("the user's")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("the user's")
    (tmp_path / ".data.partial-linked00").symlink_to(tmp_path / "elsewhere")
    others = {path.name for path in tmp_path.iterdir()} - {left.name}
    with scratch_folder(target) as first, scratch_folder(target) as second:
        assert not left.exists()
        assert first != second
        assert first.is_dir()
        assert second.is_dir()
    assert {path.name for path in tmp_path.iterdir()} == others
    assert (tmp_path / "elsewhere" / "kept").is_file()


def test_a_scratch_folder_that_another_process_took_for_a_leftover_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, made = tempfile.mkdtemp, []

    def removed_at_first(**where: Any) -> str:
        made.append(make(**where))
        if len(made) == 1:
            Path(made[0]).rmdir()
        return made[-1]

    monkeypatch.setattr(paths.tempfile, "mkdtemp", removed_at_first)
    with scratch_folder(tmp_path / "data") as folder:
        assert folder.is_dir()
    assert [Path(one) == folder for one in made] == [False, True]
