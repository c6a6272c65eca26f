"""What importing costs, and what the bare command says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from tempovlm.cli import main as cli
from tempovlm.core.errors import UserError


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def tempovlm(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "tempovlm", *words, cwd=cwd)


@pytest.mark.parametrize(
    "module",
    ["tempovlm", "tempovlm.cli.main", "tempovlm.core.plan", "tempovlm.lab.script", "tempovlm.lab.core_exp.plan"],
)
def test_import_brings_in_nothing_heavy(module: str, tmp_path: Path) -> None:
    code = f"import sys, {module}; print(*sorted(m for m in sys.modules if '.' not in m))"
    done = run(sys.executable, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "tempovlm" in loaded
    heavy = {"torch", "numpy", "PIL", "tyro", "rich", "tokenizers", "safetensors", "huggingface_hub"}
    assert not loaded & heavy


@pytest.mark.parametrize("words", [["--help"], ["-h"], []])
def test_help_lists_every_command(words: list[str], tmp_path: Path) -> None:
    done = tempovlm(*words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for name, purpose in cli.COMMANDS.items():
        assert f"{name} " in done.stdout
        assert purpose in done.stdout


def test_every_command_is_a_module_with_main(repo_root: Path) -> None:
    folder = repo_root / "src" / "tempovlm" / "cli"
    missing = [name for name in cli.COMMANDS if not (folder / f"{name}.py").is_file()]
    assert not missing


def test_version(tmp_path: Path) -> None:
    from tempovlm import __version__

    done = tempovlm("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"tempovlm {__version__}\n")


def test_unknown_command_is_named_in_one_line(tmp_path: Path) -> None:
    done = tempovlm("anwser", "x.png", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    for part in ("'anwser'", "did you mean answer?", *cli.COMMANDS):
        assert part in done.stderr


def install_command(monkeypatch: pytest.MonkeyPatch, error: BaseException | None) -> list[list[str]]:
    """Put a stand-in for `tempovlm answer` in place; it records its words and raises `error`."""
    calls: list[list[str]] = []

    def command(argv: list[str]) -> None:
        calls.append(argv)
        if error is not None:
            raise error

    module = types.ModuleType("tempovlm.cli.answer")
    module.__dict__["main"] = command
    monkeypatch.setitem(sys.modules, "tempovlm.cli.answer", module)
    return calls


def test_command_gets_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install_command(monkeypatch, None)
    assert cli.main(["answer", "x.png", "--budget_ms", "80"]) == 0
    assert calls == [["x.png", "--budget_ms", "80"]]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("x.png: not an image\n(bad header)"), 2, "x.png: not an image (bad header)"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ModuleNotFoundError("no", name="matplotlib.pyplot"), 2, "pip install 'tempovlm[experiments]'"),
    ],
)
def test_failures_take_one_line(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install_command(monkeypatch, error)
    assert cli.main(["answer"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tempovlm: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_missing_module_that_no_extra_brings_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    install_command(monkeypatch, ModuleNotFoundError("no", name="tempovlm.nowhere"))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["answer"])


def test_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "tempovlm", "--help"]
    done = subprocess.run(command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writer)
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == b""
