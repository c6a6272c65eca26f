"""A process that has imported what is slow to import, and runs Python scripts in forks of itself.

A script finds what it would find in a process of its own, but for the modules: nothing has computed in that
process and no thread was started, so that nothing is shared that a script could change. Each saves the second or
two of processor time that torch takes to import, and the third of one in which the interpreter ends its modules.
A calibration there times the smallest and the largest setting once and puts the others between them,
models and settings are not warmed up, policies are timed in warm caches, and what other processes do is looked for
during a millisecond.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

MODULES = (
    "tempovlm.api",
    "tempovlm.engine.calibration",
    "tempovlm.cli.bench",
    "tempovlm.cli.main",
    "tempovlm.control.shipped",
    "tempovlm.core.machine",
    "tempovlm.lab.charts",
    "tempovlm.lab.core_exp.sweep",
    "tempovlm.model.weights",
    "numpy.random",
    "tyro",
    "rich.progress",
    "rich.table",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    "pyarrow.parquet",
    "pandas",
    "jinja2",
)
LONGEST_S = 600


@dataclass(frozen=True, slots=True)
class Started:
    """A script that runs: its process, its words, and the files of what it prints."""

    pid: int
    words: list[object]
    files: tuple[Path, ...]
    ask: Callable[[object], int]

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Return how it ended."""
        code = self.ask(self.pid)
        out, err = (path.read_text(encoding="utf-8") for path in self.files)
        return subprocess.CompletedProcess(self.words, code, out, err)


class Preloaded:
    """Runs scripts.

    Args:
        folder: for what scripts print.
        env: the environment of all of them. How OpenMP's threads wait is read once, when torch is imported.
    """

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self.env = dict(env)
        self._folder, self._started = folder, 0
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.env
        )

    def run(
        self, script: Path, *words: object, cwd: Path, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a script; `env` is added to the environment."""
        return self.start(script, *words, cwd=cwd, env=env).wait()

    def start(self, script: Path, *words: object, cwd: Path, env: Mapping[str, str] | None = None) -> Started:
        """Start a script, beside others that run."""
        self._started += 1
        files = tuple(self._folder / f"{name}{self._started}" for name in ("out", "err"))
        pid = self._ask([list(map(str, files)), str(script), list(map(str, words)), str(cwd), dict(env or {})])
        return Started(pid, [script, *words], files, self._ask)

    def _ask(self, what: object) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{json.dumps(what)}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def serve() -> None:
    """Fork for each script in a line of stdin and print the process, or wait for one and print its exit code."""
    from tempovlm.engine.threads import start_torch

    start_torch()
    for name in MODULES:
        importlib.import_module(name)
    calibration: Any = sys.modules["tempovlm.engine.calibration"]
    calibration.measure = partial(measure_two, calibration)
    calibration.WARM_UP_ROUNDS = 0
    sys.modules["tempovlm.lab.core_exp.sweep"].warm_up = lambda *_: None  # type: ignore[attr-defined]
    sys.modules["tempovlm.core.machine"].busy_cores.__defaults__ = (1.0,)  # type: ignore[attr-defined]
    sys.modules["tempovlm.control.guard"].CROWD_BYTES = 1  # type: ignore[attr-defined]
    gc.freeze()  # else each fork copies and collects what was imported
    while line := sys.stdin.readline():
        asked = json.loads(line)
        if isinstance(asked, int):
            answer = os.waitstatus_to_exitcode(os.waitpid(asked, 0)[1])
        elif not (answer := os.fork()):
            become(*asked)
            return
        print(answer, flush=True)  # noqa: T201 - the answer


def measure_two(calibration: Any, engine: Any, output: Any, **options: Any) -> tuple[Any, ...]:
    """Time the smallest and the largest setting; each other is given a time by its place between them."""
    space = engine.space
    requests = calibration.sample_requests(0, output.upper, options.get("pictures", ()))
    ends = [
        calibration.measure_once(engine, next(requests), space.index(knobs))
        for knobs in (space.cheapest, space.native, space.cheapest, space.native)
    ][2:]
    small, large = sorted(ends, key=lambda one: one.total_ms)
    found = []
    for index, knobs in enumerate(space):
        places = [legal.index(getattr(knobs, name)) / max(len(legal) - 1, 1) for name, legal in space.axes.items()]
        share = sum(places) / len(places)
        total_ms, prefix_ms = (
            (1 - share) * getattr(small, name) + share * getattr(large, name) for name in ("total_ms", "prefix_ms")
        )
        found.append(replace(small, setting=index, total_ms=total_ms, prefix_ms=prefix_ms))
    return tuple(found)


def become(files: list[str], script: str, words: list[str], cwd: str, env: dict[str, str]) -> None:
    """Run a script as `python SCRIPT WORDS` would."""
    signal.alarm(LONGEST_S)
    for number, path in enumerate([os.devnull, *files]):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC if number else os.O_RDONLY
        os.dup2(os.open(path, flags), number)
    os.chdir(cwd)
    os.environ.update(env)
    sys.argv = [script, *words]
    sys.path[0] = str(Path(script).parent)
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        code = end.code or 0
    threading._shutdown()  # type: ignore[attr-defined]
    if threading.active_count() > 1:
        sys.exit(code)  # those that are left see how an interpreter ends
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
