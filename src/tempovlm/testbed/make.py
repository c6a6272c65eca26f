"""Make a whole test bed on disk, or nothing: all stand-ins, both splits, in the official file formats."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tempovlm.core
from tempovlm.core.errors import UserError
from tempovlm.core.paths import expanded, scratch_folder
from tempovlm.testbed import NOTICE, stand_ins
from tempovlm.testbed.bed import Bed
from tempovlm.testbed.stand_in import Record
from tempovlm.testbed.worker import draw_share, part_path

Progress = Callable[[int, int], None]
"""Callback with the pictures drawn so far and all pictures."""

_WORTH_A_PROCESS = 64
"""Pictures that take about as long to draw as a process takes to start."""

_NOTICE_TEXT = """# Synthetic data

Every picture, question and answer in this folder was drawn by a program (`tempovlm data make`). They stand in for
{what} so that everything runs without a
download; they are not those data, and figures measured on them say nothing about them. The files have the official
names and keys; `template`, `held_out` and `image_id` of a problem are extra keys. `twins/` holds, for every
validation picture, the same scene with other noise and a shift of a few pixels. The companies
in the pictures are invented.

- seed: {bed.seed}
- edition of the questions: {bed.edition}
- pictures for training: {bed.num_train} a data set
- pictures for validation: {bed.num_val} a data set
- made again by: `{command}`
"""


def make_testbed(
    out: str | Path,
    num_train: int,
    num_val: int,
    seed: int = 0,
    *,
    progress: Progress | bool = True,
    datasets: Sequence[str] = stand_ins.NAMES,
    workers: int | None = None,
) -> Path:
    """Draw a test bed into a new folder; an interrupted run leaves nothing, a killed one until the next.

    Args:
        out: The folder to make; it must not exist, or be empty.
        num_train: Training pictures of each data set.
        num_val: Validation pictures of each data set; each also gets a twin.
        seed: The same seed gives the same files.
        progress: True shows a bar on stderr, False nothing; a function is called with done and total.
        datasets: Data sets to draw.
        workers: Number of processes; 1 is this one. Default: the cores that this process may use, fewer for few
            pictures.

    Returns:
        The folder.

    Raises:
        UserError: The folder is not empty or cannot be written, or a number is out of range.
    """
    target = expanded(out).absolute()
    if num_train < 0 or num_val < 0 or num_train + num_val == 0:
        raise UserError(f"num_train and num_val must be 0 or more and not both 0, got {num_train} and {num_val}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty; choose another folder or remove it")
    most = workers or min(_cores(), (num_train + num_val) * len(datasets) // _WORTH_A_PROCESS)
    share = {
        "seed": seed,
        "num_train": num_train,
        "num_val": num_val,
        "datasets": list(datasets),
        "workers": max(1, min(most, num_train + num_val)),
    }
    try:
        with scratch_folder(target) as partial:
            _draw(partial, share, progress)
            _finish(partial, share)
            partial.chmod(0o755)
            if target.is_dir():
                target.rmdir()
            partial.rename(target)
    except OSError as error:
        raise UserError(f"cannot make the test bed in {target}: {error.strerror or error}") from error
    return target


def _cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _draw(folder: Path, share: dict[str, Any], progress: Progress | bool) -> None:
    """Draw a job (`share` as in `worker`) here or by workers, and report their counts."""
    total = (share["num_train"] + share["num_val"]) * len(share["datasets"])
    draw = _run_workers if share["workers"] > 1 else _draw_here
    if progress is True:
        with _Bar(total) as bar:
            draw(folder, share, bar.update, total)
    else:
        draw(folder, share, progress or (lambda _done, _total: None), total)


def _draw_here(folder: Path, share: dict[str, Any], progress: Progress, total: int) -> None:
    """Do the work of the only worker in this process."""
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    draw_share(folder, share | {"worker": 0}, report)


def _run_workers(folder: Path, share: dict[str, Any], progress: Progress, total: int) -> None:
    """Start one process for each worker, read their counts, and stop them all after an error."""
    workers = share["workers"]
    source = str(Path(next(iter(tempovlm.core.__path__))).parents[1])
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tempovlm.testbed.worker", str(folder)]
    processes: list[subprocess.Popen[str]] = []
    done = [0] * workers

    def read(worker: int) -> None:
        stream = processes[worker].stdout
        for line in stream or ():
            done[worker] += int(line)

    readers = [threading.Thread(target=read, args=(worker,), daemon=True) for worker in range(workers)]
    try:
        for worker in range(workers):
            arguments = [*command, json.dumps(share | {"worker": worker})]
            process = subprocess.Popen(
                arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
            )
            processes.append(process)
        for reader in readers:
            reader.start()
        while any(reader.is_alive() for reader in readers):
            for reader in readers:
                reader.join(timeout=0.1)
            progress(sum(done), total)
        for process in processes:
            _, errors = process.communicate()
            if process.returncode:
                last = errors.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
                raise UserError(f"drawing the test bed failed: {last[0]}")
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def _finish(folder: Path, share: dict[str, Any]) -> None:
    """Join the workers' parts into the official files and add the notices."""
    for dataset in share["datasets"]:
        (folder / dataset).mkdir(exist_ok=True)
        for split in ("train", "val"):
            records: list[Record] = []
            for worker in range(share["workers"]):
                path = part_path(folder, dataset, split, worker)
                if path.is_file():
                    records += json.loads(path.read_text(encoding="utf-8"))
                    path.unlink()
            records.sort(key=lambda record: int(record["index"]))
            stand_ins.find(dataset).write(folder / dataset, split, records)
        _write_notice(folder / dataset, f"the data set {dataset}", share)
    _write_notice(folder, "the data sets " + ", ".join(share["datasets"]), share)


def _write_notice(folder: Path, what: str, share: dict[str, Any]) -> None:
    bed = Bed(**{name: share[name] for name in ("num_train", "num_val", "seed")})
    text = _NOTICE_TEXT.format(what=what, bed=bed, command=bed.command())
    (folder / NOTICE).write_text(text, encoding="utf-8")


class _Bar:
    """Return a progress bar on stderr with the time left."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (TextColumn("drawing pictures"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = RichProgress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done: int, total: int) -> None:
        """Show the progress."""
        self._bar.update(self._task, completed=done, total=total)
