"""constraints.txt holds a version for every package that the make targets install, and the Makefile uses it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LINES = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
PINS = dict(line.split("==") for line in LINES)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = ("", "experiments", "serve", "dev")


def needed(requirements: list[str], extras: tuple[str, ...]) -> Iterator[Requirement]:
    """Those requirements that count here, with these extras."""
    for text in requirements:
        one = Requirement(text)
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras):
            yield one


def declared() -> list[Requirement]:
    project = PROJECT["project"]
    optional = project["optional-dependencies"]
    texts = [
        *project["dependencies"],
        *optional["experiments"],
        *optional["serve"],
        *optional["dev"],
        *PROJECT["build-system"]["requires"],
    ]
    return [*needed(texts, EXTRAS)]


def test_versions_are_exact_and_named_once() -> None:
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in LINES)
    assert len(PINS) == len(LINES)


def test_what_the_package_asks_for_is_a_range_that_its_pin_is_in() -> None:
    for one in declared():
        pin = PINS[canonicalize_name(one.name)]
        assert one.specifier.contains(pin), one
        assert not [part for part in one.specifier if part.operator in ("==", "===")], one


def test_indirect_ones_are_pinned_too() -> None:
    """From one installed package to the next, so long as the version installed is the pinned one."""
    queue, seen = declared(), set[str]()
    while queue:
        one = queue.pop()
        name = canonicalize_name(one.name)
        assert name in PINS, name
        try:
            here = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if name in seen or here.version.partition("+")[0] != PINS[name]:
            continue
        seen.add(name)
        queue += needed(here.requires or [], ("", *one.extras))


@pytest.mark.parametrize(
    ("word", "folder"), [("CONSTRAINTS=constraints.txt", ".venv"), ("CONSTRAINTS=", ".venv-newest")]
)
def test_torch_comes_first_by_its_exact_version(word: str, folder: str) -> None:
    command = ["make", "--dry-run", "--always-make", "demo", "PYTHON=true", word]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]}
    )
    installs = [line for line in done.stdout.splitlines() if "pip install" in line]
    assert len(installs) == 2
    assert ["--upgrade" in line for line in installs] == [folder == ".venv-newest"] * 2
    torch = f"torch=={PINS['torch']}"
    assert installs[0].endswith(f" {torch}")
    compiler = "" if any(map(shutil.which, ("cc", "gcc", "clang"))) else ",cpu"
    assert installs[1].endswith(f" {torch} -e '.[experiments,serve,dev{compiler}]'")
    for line in installs:
        assert f"{folder}/bin/pip install" in line
        assert ("PIP_CONSTRAINT=constraints.txt" in line) is (folder == ".venv")
        assert ("PIP_BUILD_CONSTRAINT=constraints.txt" in line) is (folder == ".venv")
