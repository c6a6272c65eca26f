"""The turns of a package's version in the benchmark of back ends: answers, and the times of a decoder's stages.

It uses only what the first version has too. Started as a program, it answers for the version that is on the path:
requests and results are lines of JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peers_cpu_stages import Job, our_job, works_of

if TYPE_CHECKING:
    from tempovlm.api import TempoVLM

ROWS = {
    f"{work}_{setting}": f"{title}, {setting.replace('_', '/')}"
    for work, title in (
        ("prefill_289", "prompt of 289 tokens"),
        ("prefill_700", "prompt of 700 tokens"),
        ("decode_300", "a token after 300"),
    )
    for setting in ("k8_b16", "k4_b8")
}
"""Names of the rows of a decoder, as `works_of` has them, with their titles."""


def load(model: str | Path, threads: int | None, **more: Any) -> TempoVLM:
    """Load a model for a CPU; at once, without calibration."""
    from tempovlm import api

    return api.load(str(model), calibrate=False, progress=False, device="cpu", threads=threads, **more)


def jobs_of(vlm: TempoVLM) -> dict[str, Job]:
    """Make the turns at each row of a decoder."""
    return {work.name: our_job(vlm, None, work) for work in works_of(vlm) if work.name in ROWS}


def main() -> None:
    """Answer requests until there are none."""
    model, threads = sys.argv[1], int(sys.argv[2]) or None
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the package prints
    from tempovlm.engine.threads import prepare

    prepare(threads)
    vlm, jobs = load(model, threads), dict[str, Job]()
    for line in sys.stdin:
        name, *words = json.loads(line)
        found: Any = None
        if name == "stamp":
            found = vlm.stamp("synthetic").to_json()
        elif name == "answer":
            picture, question, style = words
            answer = vlm.answer(picture, question, style=style)
            found = [answer.text, answer.timings_ms]
        elif name == "decoder":
            jobs = jobs_of(load(words[0], threads))
        else:
            found = jobs[name]()
        print(json.dumps(found), file=results, flush=True)


if __name__ == "__main__":
    main()
