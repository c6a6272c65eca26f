"""Fixtures for all tests: where the repository is, and a cache directory that is not the user's."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from interpreter import spare_the_interpreter
from run_report import pytest_configure, pytest_terminal_summary  # noqa: F401 - pytest finds them here
from tempovlm.engine.threads import prepare

if TYPE_CHECKING:
    from preloaded import Preloaded

# Before any test module imports torch: spinning threads would make tests slow beside other processes.
prepare()

HAS_GPU = Path("/dev/nvidiactl").exists()

# Before Triton is imported, and with it its own library: without a GPU, kernels run in its interpreter.
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parents[1]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Draws that no generator is named for are the same whatever ran before: before the first fixture is made.

    Without a GPU, torch would note each seed for one that may come, with the whole stack of calls.
    """
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        (torch if HAS_GPU else torch.default_generator).manual_seed(0)


def pytest_collection_finish() -> None:
    """What was imported and collected stays: looking through it again and again took a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    spare_the_interpreter()
    # No test compares tensors that are spread over processes, whose code takes a second to import.
    if "torch.testing" in sys.modules:
        sys.modules["torch.testing._comparison"]._HAS_DTENSOR = False


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The root of the repository."""
    return ROOT


def _of_all_workers(factory: pytest.TempPathFactory) -> Path:
    """A folder of this run that its workers share."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache directory for the whole run, inherited by subprocesses.

    Tests neither read nor write the user's calibration and data; one calibration, one test bed and one compiled
    library serve every test of all workers. Nothing is fetched from a model hub.
    """
    folder = _of_all_workers(tmp_path_factory) / "cache"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "XDG_CACHE_HOME", str(folder))
        patch.setitem(os.environ, "TEMPOVLM_KERNELS_DIR", str(folder / "kernels"))
        patch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
        yield folder


@pytest.fixture(scope="session")
def few_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small test bed for scripts, which draw 900 pictures where they find none."""
    from tempovlm.testbed.make import make_testbed

    return make_testbed(tmp_path_factory.mktemp("few_pictures") / "data", 8, 8, progress=False)


@pytest.fixture(scope="session")
def preloaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Preloaded]:
    """Runs scripts as processes of their own, in the environment of a user who has set the workers' threads."""
    from preloaded import Preloaded

    # Of the make that runs the tests.
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "CONSTRAINTS")
    env = {name: value for name, value in os.environ.items() if name not in outer}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    process = Preloaded(tmp_path_factory.mktemp("preloaded"), env)
    yield process
    process.close()
