from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tempovlm.engine.environment import commit_of


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "protocol.file.allow=always"]
    command = ["git", "-C", str(folder), *who, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def package_in(folder: Path) -> Path:
    package = folder / "tempovlm"
    (package / "core").mkdir(parents=True)
    for name in ("__init__.py", "core/__init__.py"):
        (package / name).write_text("x = 1\n")
    return package


def repository(folder: Path, *, ignored: str = "") -> str:
    """Make a repository of everything below a folder, and return its commit."""
    folder.mkdir(exist_ok=True)
    (folder / ".gitignore").write_text(ignored)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "first")
    return git(folder, "rev-parse", "--short=12", "HEAD")


def test_an_environment_within_the_users_repository_has_no_commit(tmp_path: Path) -> None:
    package = package_in(tmp_path / ".venv" / "lib" / "site-packages")
    repository(tmp_path, ignored=".venv\n")
    assert commit_of(package) is None
    (tmp_path / ".gitignore").write_text("")
    assert commit_of(package) is None, "neither ignored nor in a commit"
    git(tmp_path, "add", "-A")
    assert commit_of(package) is None, "added and not yet in a commit"


def test_a_repository_that_holds_the_source_is_named(tmp_path: Path) -> None:
    package = package_in(tmp_path / "third_party")
    head = repository(tmp_path)
    assert commit_of(package) == head
    (tmp_path / ".gitignore").write_text("# changed\n")
    assert commit_of(package) == head, "changes elsewhere are none of the package"
    (package / "core" / "__init__.py").write_text("x = 2\n")
    assert commit_of(package) == f"{head}+", "a change in any of its folders counts"


def test_worktrees_and_submodules_have_their_own_commit(tmp_path: Path) -> None:
    source, user = tmp_path / "source", tmp_path / "user"
    package_in(source)
    first = repository(source)
    git(source, "worktree", "add", "-q", "-b", "other", str(tmp_path / "tree"))
    (source / "more.txt").write_text("more")
    git(source, "add", "-A")
    git(source, "commit", "-q", "-m", "second")
    second = git(source, "rev-parse", "--short=12", "HEAD")
    assert commit_of(source / "tempovlm") == second != first
    assert commit_of(tmp_path / "tree" / "tempovlm") == first
    repository(user)
    git(user, "submodule", "--quiet", "add", str(source), "module")
    git(user, "commit", "-q", "-m", "with a submodule")
    assert commit_of(user / "module" / "tempovlm") == second


def test_a_hook_of_the_users_repository_does_not_lend_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user, source = tmp_path / "user", tmp_path / "source"
    package_in(user)
    repository(user)
    package = package_in(source)
    head = repository(source, ignored="# another\n")
    monkeypatch.setenv("GIT_DIR", str(user / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(user / ".git" / "index"))
    assert commit_of(package) == head
    assert commit_of(package_in(tmp_path / "outside")) is None


def test_there_is_no_commit_without_git_or_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = package_in(tmp_path)
    assert commit_of(package) is None
    git(tmp_path, "init", "-q")
    assert commit_of(package) is None, "a repository without a commit"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of(package) is None
