"""schemathesis, which makes requests from the API's own description, finds nothing that is not as described."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asgi import NEEDS

pytest.importorskip("uvicorn", reason=NEEDS)

from test_server import Running

TOOL = shutil.which("schemathesis")
VERSION = "4.32.5"
HOOKS = Path(__file__).parents[2] / "schemathesis_hooks.py"
SEED, EXAMPLES = 17, 60


@pytest.mark.skipif(TOOL is None, reason=f"needs schemathesis on the path: pipx install schemathesis=={VERSION}")
def test_the_api_is_as_it_is_described(
    app_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    running = Running(app_of(), monkeypatch)
    host, port = running.address[:2]
    command = [TOOL, "run", f"http://{host}:{port}/openapi.json", "--continue-on-failure", "--no-color"]
    limits = ["--seed", str(SEED), "--max-examples", str(EXAMPLES), "--phases", "examples,coverage,fuzzing"]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    hooks = {"SCHEMATHESIS_HOOKS": HOOKS.stem, "PYTHONPATH": str(HOOKS.parent)}
    found = subprocess.run([*command, *limits], env=clean | hooks, cwd=tmp_path, capture_output=True, text=True)
    running.signal()
    running.thread.join()
    assert found.returncode == 0, found.stdout + found.stderr
