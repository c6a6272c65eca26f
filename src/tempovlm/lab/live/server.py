"""Runs `tempovlm serve` as a process of its own, or finds one that runs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tempovlm.core.errors import UserError
from tempovlm.core.units import now_ms
from tempovlm.lab.live.client import Client

START_MS = 180_000.0
"""The longest that a server may take to start."""

_HTTP_PORT, _LOOK_S, _END_S = 80, 0.05, 60.0
_LISTENS = re.compile(r"http://127\.0\.0\.1:(\d+)\S* serves")


@dataclass(frozen=True, slots=True)
class Server:
    """A running server: its client's address and its process."""

    port: int
    process: subprocess.Popen[bytes]

    def client(self) -> Client:
        """Return a client of it."""
        return Client("127.0.0.1", self.port)

    def rss_mb(self) -> float:
        """Return the memory that its process holds, in megabytes."""
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())
        return int(found[1]) / 1024 if found else float("nan")


@contextmanager
def serving(model: str, *flags: str, cores: Sequence[int] = ()) -> Iterator[Server]:
    """Run a server while the block runs.

    Args:
        model: pocket, a model folder or a hub id.
        flags: further flags of `tempovlm serve`.
        cores: on which it runs; by default on those of this process.

    Raises:
        UserError: it does not start; says what it said last.
    """
    command = [sys.executable, "-m", "tempovlm.cli.main", "serve", "--model", model, "--port", "0", *flags]
    check_cores(cores)
    if cores:
        command = ["taskset", "--cpu-list", ",".join(map(str, cores)), *command]
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        process = subprocess.Popen(command, stderr=log)
        try:
            yield Server(_port_of(process, Path(log.name)), process)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def check_cores(cores: Sequence[int]) -> None:
    """Raise a `UserError` unless a process can be kept on some cores; none are all right."""
    if cores and shutil.which("taskset") is None:
        raise UserError("--server_cores: needs the command taskset, of util-linux")
    if wrong := set(cores) - set(range(os.cpu_count() or 1)):
        raise UserError(f"--server_cores {min(wrong)}: this machine has no such core")


@contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """Keep this thread on some cores while the block runs; where they are none it stays on its own.

    Raises:
        UserError: the machine has no such cores.
    """
    check_cores(cores)
    before = os.sched_getaffinity(0) if cores else set[int]()
    if cores:
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, before)


def stamp_of(model: str, device: str = "auto", cores: Sequence[int] = ()) -> dict[str, Any]:
    """Return the stamp of figures about a server of a model; on a CPU it loads the model here once more.

    Args:
        model: pocket, a model folder or a hub id.
        device: of the server.
        cores: on which it runs.
    """
    from tempovlm import api
    from tempovlm.engine.threads import pick_device, pick_dtype

    with on_cores(cores):
        where = pick_device(device)
        if where.type == "cpu":
            return api.load(model, device=device, warmup=False, progress=False).stamp().to_json()
        from tempovlm.core.knobs import KnobSpace
        from tempovlm.engine.environment import collect_stamp
        from tempovlm.model.weights import read_config, weights_hash

        folder = api.model_folder(model)
        return collect_stamp(
            model="pocket" if model == "pocket" else folder.name,
            weights_hash=weights_hash(folder),
            space=KnobSpace.for_model(read_config(folder).shape),
            device=where,
            dtype=pick_dtype(None, where),
        ).to_json()


def _port_of(process: subprocess.Popen[bytes], log: Path) -> int:
    """Return the port that a server's log names once it has started."""
    end_ms = now_ms() + START_MS
    while process.poll() is None and now_ms() < end_ms:
        found = _LISTENS.search(log.read_text())
        if found:
            return int(found[1])
        time.sleep(_LOOK_S)
    said = log.read_text().strip().splitlines()
    raise UserError(f"tempovlm serve did not start: {said[-1] if said else 'it said nothing'}")


def client_of(url: str) -> Client:
    """Return a client of the server at a URL such as `http://127.0.0.1:8000`.

    Raises:
        UserError: it is no such URL.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if host is None or parts.scheme != "http" or parts.path.strip("/"):
        raise UserError(f"--url {url}: give the address of a server, such as http://127.0.0.1:8000")
    return Client(host, _HTTP_PORT if port is None else port)
