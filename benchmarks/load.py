"""Loading a full-size checkpoint against reading its bytes: time and peak host memory, as JSON.

Each measurement runs in its own process, to keep their memory apart; they take turns, and the
files are read once before. A page cache stays warm only where the machine's memory holds files and model together:
`fits_warm` says so for each model, and on a small machine a shorter model is measured beside the whole one. `read`
fills memory as large as the files with their bytes, in 16 MB pieces, and does nothing else; `load` is
`tempovlm.model.weights.load_model`, in bfloat16 on the CPU. Weights are random.

    python benchmarks/load.py --model /path/of/checkpoint /path/of/another
    python benchmarks/load.py --scratch /tmp        # writes 14.4 and 8 GB first, and removes them afterwards
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "load.json"
PIECE_BYTES = 16 << 20
ROOM_BYTES = 40 << 30


def peak_bytes() -> int:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_once(folder: Path) -> dict[str, float]:
    """Read the weights' bytes into fresh memory, as a loader must at least do."""
    import torch

    from tempovlm.model.files.hub import checkpoint_files

    files = checkpoint_files(folder)
    before, begin = peak_bytes(), time.perf_counter()
    kept = [torch.empty(path.stat().st_size, dtype=torch.uint8) for path in files]
    for path, memory in zip(files, kept, strict=True):
        rest = memoryview(memory.numpy())
        with path.open("rb", buffering=0) as file:
            while rest:
                rest = rest[file.readinto(rest[:PIECE_BYTES]) :]
    return {"ms": (time.perf_counter() - begin) * 1e3, "peak_bytes": peak_bytes(), "before_bytes": before}


def load_once(folder: Path) -> dict[str, float]:
    """Load the model."""
    import torch

    from tempovlm.model.weights import load_model

    # The first model of a process pays for what torch imports to make one without memory.
    torch.nn.Linear(1, 1, device="meta").to_empty(device="cpu")
    before, begin = peak_bytes(), time.perf_counter()
    model = load_model(folder, "cpu", torch.bfloat16)
    spent_ms = (time.perf_counter() - begin) * 1e3
    size = sum(parameter.nbytes for parameter in model.parameters())
    return {"ms": spent_ms, "peak_bytes": peak_bytes(), "before_bytes": before, "model_bytes": size}


def in_own_process(what: str, folder: Path) -> dict[str, float]:
    """One measurement by a fresh interpreter."""
    command = [sys.executable, __file__, "--model", str(folder), "--once", what]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def stamp(folder: Path) -> dict[str, Any]:
    """Return the stamp of the figures."""
    import torch

    from tempovlm.core.knobs import KnobSpace
    from tempovlm.engine.environment import collect_stamp
    from tempovlm.model.weights import read_config, weights_hash

    return collect_stamp(
        model="molmoe-1b, random weights",
        weights_hash=weights_hash(folder),
        space=KnobSpace.for_model(read_config(folder).shape),
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
    ).to_json()


def measure(folder: Path, repeats: int) -> dict[str, Any]:
    """Read and load in turn, each `repeats` times."""
    from tempovlm.model.files.hub import checkpoint_files
    from tempovlm.model.weights import read_config

    size = sum(path.stat().st_size for path in checkpoint_files(folder))
    in_own_process("read", folder)
    runs: dict[str, list[dict[str, float]]] = {"read": [], "load": []}
    for _ in range(repeats):
        for what, found in runs.items():
            found.append(in_own_process(what, folder))
    load_ms, read_ms = (statistics.median(run["ms"] for run in runs[what]) for what in ("load", "read"))
    model_bytes = runs["load"][0]["model_bytes"]
    peak = max(run["peak_bytes"] for run in runs["load"])
    return {
        "num_blocks": read_config(folder).num_blocks,
        "fits_warm": 2 * size < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "file_bytes": size,
        "model_bytes": model_bytes,
        "read_ms": read_ms,
        "load_ms": load_ms,
        "load_over_read": load_ms / read_ms,
        "load_gb_per_s": size / load_ms / 1e6,
        "peak_bytes": peak,
        "peak_over_model": peak / model_bytes,
        "runs": runs,
        "stamp": stamp(folder),
    }


def main() -> None:
    """Measure, print, and keep the result beside this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="+", help="checkpoint folders; without it two are written")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where it is written")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--once", choices=("read", "load"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        once = read_once if args.once == "read" else load_once
        print(json.dumps(once(args.model[0])))
        return
    if args.model is not None:
        result = [measure(folder, args.repeats) for folder in args.model]
    else:
        if shutil.disk_usage(args.scratch).free < ROOM_BYTES:
            sys.exit(f"{args.scratch}: less than 40 GB are free")
        from tempovlm.model.config import MOLMOE_1B
        from tempovlm.model.weights import write_random

        result = []
        for config in (MOLMOE_1B, replace(MOLMOE_1B, num_blocks=8)):
            with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
                write_random(Path(scratch) / "model", config)
                result.append(measure(Path(scratch) / "model", args.repeats))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"models": result}, indent=2) + "\n", encoding="utf-8")
    print(json.dumps([{name: value for name, value in one.items() if name != "runs"} for one in result], indent=2))


if __name__ == "__main__":
    main()
