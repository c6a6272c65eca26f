"""CUDA in a forked child is refused in one line, and the child can answer on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SCRIPT = """
import json, os, sys
import tempovlm

def load(device):
    return tempovlm.load(sys.argv[1], device=device, warmup=False, progress=False, threads=2)

model = load("cuda")
text = model.answer(None, "what?", max_new_tokens=2).text
found = []
for work in (
    lambda: model.answer(None, "what?"),
    lambda: model.answer_batch([(None, "what?")]),
    lambda: load("cuda"),
    lambda: load("auto"),
    lambda: load("cpu").answer(None, "what?", max_new_tokens=2),
):
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            said = "answered" if work() else "nothing"
        except tempovlm.UserError as error:
            said = str(error)
        except BaseException as error:
            said = f"failed: {error!r}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    found.append(os.read(reader, 4096).decode())
print(json.dumps(found))
"""


def test_a_child_is_told(tmp_path: Path) -> None:
    folder = tiny_model.save_folder(tmp_path / "tiny")
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True, check=True, timeout=300
    )
    *told, on_cpu = json.loads(run.stdout)
    assert all("CUDA does not work in a process forked after it was used" in line for line in told), told
    assert on_cpu == "answered"
