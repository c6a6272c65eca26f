"""GPU memory of an engine by part: weights, the buffers of its lanes and stages, its graphs and answers, as JSON.

`allocated` counts tensors, `reserved` what the process has asked the driver for, `device` everything that the
process takes of the GPU, with the CUDA context and the kernels. With random weights nothing but memory counts.

    python benchmarks/memory.py --model molmoe-1b --json benchmarks/results/memory_molmoe_h200.json
"""

# ruff: noqa: E402 - threads are set before torch is imported

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tempovlm.engine.threads import pick_device, prepare

prepare()

import numpy as np
import torch

from engine_reference import engine_of, fill
from output import write_json
from tempovlm.control.guard import Guard
from tempovlm.core.request import Request
from tempovlm.engine.environment import collect_stamp
from tempovlm.model.config import PRESETS
from tempovlm.model.weights import empty_model

PICTURE = (1080, 1920, 3)
ANSWERS, TOKENS = 4, 200


def read(device: torch.device, used_before: int) -> dict[str, float]:
    """GB so far, and the most so far."""
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    found = {
        "allocated_gb": torch.cuda.memory_allocated(device),
        "reserved_gb": torch.cuda.memory_reserved(device),
        "peak_allocated_gb": torch.cuda.max_memory_allocated(device),
        "device_gb": total - free - used_before,
    }
    return {name: count / 1e9 for name, count in found.items()}


def main() -> None:
    """Build an engine part by part, ask it, and write what each part took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(PRESETS), default="molmoe-1b")
    parser.add_argument("--json", type=Path, help="file to write; standard output without it")
    flags = parser.parse_args()
    device = pick_device("cuda")
    free, total = torch.cuda.mem_get_info(device)
    before, steps = total - free, dict[str, Any]()
    model = fill(empty_model(PRESETS[flags.model], device, torch.bfloat16))
    steps["weights"] = read(device, before)
    engine = engine_of(model, f"{flags.model}, random weights")
    steps["buffers"] = read(device, before)
    engine.warmup()
    steps["graphs"] = read(device, before)
    picture = np.random.default_rng(0).integers(0, 256, PICTURE, dtype=np.uint8)
    request = Request(images=(picture,), question="what does the sign say?", max_new_tokens=TOKENS)
    for knobs in (engine.space.cheapest, engine.space.largest) * ANSWERS:
        engine.answer(request, Guard.fixed(knobs, engine.space))
    steps["answers"] = read(device, before)
    stamp = collect_stamp(
        model=engine.name, weights_hash="random", space=engine.space, device=device, dtype=torch.bfloat16
    )
    record = {
        "stamp": stamp.to_json(),
        "parameters": sum(one.numel() for one in model.parameters()),
        "steps": steps,
    }
    write_json(record, flags.json)


if __name__ == "__main__":
    main()
