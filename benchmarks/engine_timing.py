"""Timing for the engine's benchmark, and the floor that times are compared with.

A floor is the larger of bytes over copy bandwidth and operations over matrix rate, both measured on the device. On
a CPU the rate is the best that torch reaches in float32 and bfloat16, and OpenVINO where it is installed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from tempovlm.core.cost import Cost
from tempovlm.core.units import now_ms

FEW = 3
"""Repeats of a quick run, whose figures are only a check."""


@dataclass(frozen=True, slots=True)
class Floor:
    """Limits of the device: bytes moved (read and written) and operations, for each millisecond."""

    bytes_per_ms: float
    flops_per_ms: float

    def of(self, cost: Cost, *stages: str) -> dict[str, float]:
        """Bytes, operations and least time of some stages, one after the other."""
        floor_ms = sum(
            max(cost.bytes[stage] / self.bytes_per_ms, cost.flops[stage] / self.flops_per_ms) for stage in stages
        )
        return {
            "floor_ms": floor_ms,
            "bytes": sum(cost.bytes[stage] for stage in stages),
            "flops": sum(cost.flops[stage] for stage in stages),
        }


def spread(times_ms: list[float]) -> dict[str, float]:
    """Median, tenth and ninetieth percentile."""
    low, high = np.quantile(times_ms, (0.1, 0.9))
    return {"ms_median": statistics.median(times_ms), "ms_p10": float(low), "ms_p90": float(high)}


def timed(
    run: Callable[[], Any], repeats: int, device: torch.device, before: Callable[[], Any] = lambda: None
) -> list[float]:
    """Times of a call by the device's own clock, after a few warm ones; `before` is called untimed each time."""
    for _ in range(1 + 2 * (repeats > FEW)):
        before()
        run()
    if device.type == "cpu":
        times_ms = []
        for _ in range(repeats):
            before()
            begin_ms = now_ms()
            run()
            times_ms.append(now_ms() - begin_ms)
        return times_ms
    pairs, stream = [], torch.cuda.current_stream(device)
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before()
        begin.record(stream)
        run()
        end.record(stream)
        pairs.append((begin, end))
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in pairs]


def measure_floor(device: torch.device, dtype: torch.dtype, repeats: int) -> Floor:
    """A large copy and a large matrix product; on a CPU a smaller product where few repeats are enough."""
    large = device.type == "cuda"
    values = torch.ones((1 << 30 if large else 1 << 26) // 4, device=device)
    target = torch.empty_like(values)
    copy_ms = statistics.median(timed(lambda: target.copy_(values), repeats, device))
    side = 8192 if large else 1024 if repeats > FEW else 256
    products = [product(side, device, kind) for kind in ({dtype} if large else (torch.float32, torch.bfloat16))]
    if not large and find_spec("openvino"):
        products += [openvino_product(side, hint) for hint in ("f32", "bf16")]
    product_ms = min(statistics.median(timed(run, repeats, device)) for run in products)
    return Floor(2 * values.nbytes / copy_ms, 2 * side**3 / product_ms)


def product(side: int, device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    """A square product by torch."""
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    return lambda: a @ b


def openvino_product(side: int, hint: str) -> Callable[[], Any]:
    """The same by OpenVINO, with as many threads as torch has."""
    import openvino
    from openvino import opset15 as op

    x = op.parameter([side, side], np.float32)
    y = op.matmul(x, op.constant(np.random.default_rng(0).random((side, side), dtype=np.float32)), False, True)
    options = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = (
        openvino.Core().compile_model(openvino.Model([op.result(y)], [x]), "CPU", options).create_infer_request()
    )
    request.set_input_tensor(openvino.Tensor(np.ones((side, side), np.float32)))
    return request.infer
