"""What a run of the tests says at its end, and the order in which they run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from run_report import skip_lines

FILES = {
    "test_a.py": "import pytest\n\n\n@pytest.mark.parametrize('i', range(6))\ndef test_a(i):\n    pass\n",
    "test_b.py": (
        "import pytest\n\n\n@pytest.mark.parametrize('i', range(3))\ndef test_b(i):\n"
        "    pytest.skip('no scales here; bring some')\n\n\n"
        "def test_absent():\n    pytest.importorskip('pycocoevalcap.absent')\n"
    ),
    "test_c.py": "def test_c():\n    pass\n",
}


def test_skips_are_counted_by_reason_with_the_remedy() -> None:
    absent = "Skipped: could not import '{0}': No module named '{0}'"
    reasons = [absent.format("pycocoevalcap"), *["Skipped: no file; name it in X"] * 2, absent.format("other")]
    assert skip_lines(reasons) == [
        "    2  no file; name it in X",
        "    1  pycocoevalcap is not installed; pip install -e '.[captions]' brings it",
        "    1  could not import 'other': No module named 'other'",
    ]
    assert skip_lines([]) == []


@pytest.fixture
def run(tmp_path: Path, repo_root: Path):
    """Runs a few files under this suite's conftest and options; gives the lines that it prints."""
    for name in ("tests/conftest.py", "tests/interpreter.py", "tests/run_report.py", "pyproject.toml"):
        (tmp_path / Path(name).name).write_text((repo_root / name).read_text())
    folder = tmp_path / "tests"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)

    def lines(*words: str) -> list[str]:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()

    return lines


def ran(lines: list[str]) -> list[str]:
    """The tests of a verbose run, in order."""
    return [word for line in lines for word in line.split() if "::" in word]


def test_a_run_ends_with_what_was_skipped_and_the_closing_line(run) -> None:
    lines = run("-q", "--numprocesses", "2", "--dist", "loadfile")
    assert "    3  no scales here; bring some" in lines
    assert any(line.startswith("    1  pycocoevalcap is not installed") for line in lines)
    assert "tests of CUDA devices are left out; pytest -m gpu tests/gpu runs them" in lines
    assert lines[-1].startswith("7 passed, 4 skipped in ")
    assert not any("test_b.py:" in line for line in lines)


def test_the_order_is_that_of_the_files_unless_asked(run) -> None:
    usual = ran(run("-v"))
    assert [name.partition("::")[0] for name in usual] == sorted(name.partition("::")[0] for name in usual)
    pytest.importorskip("random_order")
    drawn = run("-v", "--random-order-seed", "1")
    assert sorted(ran(drawn)) == sorted(usual)
    assert ran(drawn) != usual
    assert "in random order; --random-order-seed=1 repeats it" in drawn
    assert ran(run("-v", "--random-order-seed", "1")) == ran(drawn)


def test_the_seed_is_told_where_none_was_given_and_binds_all_workers(run) -> None:
    pytest.importorskip("random_order")
    lines = run("-v", "--random-order", "--numprocesses", "2", "--dist", "loadfile")
    assert len(set(ran(lines))) == 11
    (told,) = (line for line in lines if line.startswith("in random order"))
    assert told.partition("--random-order-seed=")[2].split()[0].isdigit()


def test_files_start_in_the_order_drawn(run) -> None:
    """And not the largest first, as pytest-xdist would."""
    pytest.importorskip("random_order")

    def files(*words: str) -> tuple[str, ...]:
        lines = run("-v", "--numprocesses", "1", "--dist", "loadfile", *words)
        return tuple(dict.fromkeys(name.partition("::")[0] for name in ran(lines)))

    assert files() == ("tests/test_a.py", "tests/test_b.py", "tests/test_c.py")
    assert files("--random-order-seed", "1") != files("--random-order-seed", "2")
