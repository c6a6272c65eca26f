"""Measure how far logits are from the published implementation's, with the same weights, as JSON.

On CUDA: the full-size MolmoE-1B with random weights, the engine's kernels and graphs in bfloat16 against the model
in float32, which golden tests hold against the published numbers; and against the published implementation itself
where `TEMPOVLM_REFERENCE` names a checkout of it (see `parity_published`). On a CPU: the model in float32 against
the stored published numbers of a reduced config, as the golden tests read them.

    python benchmarks/parity.py --device cuda --json benchmarks/results/parity_h200.json
    python benchmarks/parity.py --device cpu --json benchmarks/results/parity_cpu.json
"""

# ruff: noqa: E402 - threads are set before torch is imported

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from tempovlm.engine.threads import pick_device, prepare

prepare()

import torch

import parity_published
from parity_runs import CASES, Case, in_float32, measure_case, random_model, runner, summary
from tempovlm.core.knobs import KnobSpace
from tempovlm.core.paths import write_whole
from tempovlm.core.units import now_ms
from tempovlm.engine.cuda.graphs import GraphDecoder
from tempovlm.engine.environment import collect_stamp
from tempovlm.model.config import MOLMOE_1B, ModelConfig
from tempovlm.model.vlm import Molmo

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
BYTES_PER_GB = 1e9


def measure(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    cases: tuple[Case, ...] = CASES,
    reference: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Return all figures of one random model: a record for the result file.

    Args:
        config: of the model.
        device: where all models go.
        dtype: of the fast path.
        cases: prompts.
        reference: folder of the published implementation.
        seed: of the weights.
    """
    begin_ms = now_ms()
    if device.type == "cuda":
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)
    model = random_model(config, device, dtype, seed)
    exact = in_float32(model)
    published, remark = parity_published.load(reference, exact)
    print(f"models made in {(now_ms() - begin_ms) / 1e3:.1f} s; published implementation {remark}", flush=True)
    fast = runner(model, GraphDecoder(model) if device.type == "cuda" else None)
    rows = []
    for case in cases:
        rows.append(measure_case(runner(exact), fast, case, published))
        print(f"{case.name}: {json.dumps(rows[-1])}", flush=True)
    record: dict[str, Any] = {"stamp": _stamp("molmoe-1b, random weights", model), **summary(rows), "rows": rows}
    record["same_experts"] = summary([row["same_experts"] for row in rows])
    for name in ("published_autocast", "published_float32"):
        pairs = [row[name] for row in rows if name in row]
        if pairs:
            record[name] = {how: summary([pair[how] for pair in pairs]) for how in pairs[0]}
    remark = remark if published is None else published.remark
    record |= {"published": remark, "seed": seed, "total_ms": now_ms() - begin_ms}
    if device.type == "cuda":
        record["peak_gb"] = torch.cuda.max_memory_allocated(device) / BYTES_PER_GB
    return record


def _stamp(name: str, model: Molmo) -> dict[str, Any]:
    weight, space = model.decoder.embedding, KnobSpace.for_model(model.config.shape)
    return collect_stamp(
        model=name, weights_hash="random", space=space, device=weight.device, dtype=weight.dtype
    ).to_json()


@torch.inference_mode()
def measure_golden() -> dict[str, Any]:
    """The model in float32 against the stored numbers of the published implementation on a reduced config."""
    sys.path.insert(0, str(GOLDEN))
    golden: Any = importlib.import_module("test_molmoe_logits")
    model, rows = golden.build_model(), []
    for name, case in golden.CASES.items():
        logits = model.prefill(golden.embedded(case), golden.plan_of(case["top_k"]), None)[0].double()
        error = (logits - torch.tensor(case["last"], dtype=torch.float64)).abs().max()
        rows.append(
            {
                "name": name,
                "tokens": case["length"],
                "max_relative_logit_error": float(error) / golden.largest_logit(case),
            }
        )
    worst = max(row["max_relative_logit_error"] for row in rows)
    stamp = _stamp("reduced molmoe-1b, drawn weights", model)
    return {"stamp": stamp, "max_relative_logit_error": worst, "rows": rows}


def write(record: dict[str, Any], path: Path) -> None:
    """Write a record, whole or not at all."""
    write_whole(path, json.dumps(record, indent=1) + "\n")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="file to write")
    flags = parser.parse_args()
    device = pick_device(flags.device)
    if device.type == "cpu":
        record = measure_golden()
    else:
        reference = os.environ.get("TEMPOVLM_REFERENCE")
        record = measure(MOLMOE_1B, device, torch.bfloat16, reference=reference)
    print(json.dumps({name: record[name] for name in record if name not in ("rows", "stamp")}, indent=1))
    if flags.json:
        write(record, flags.json)


if __name__ == "__main__":
    main()
