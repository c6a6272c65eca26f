"""Timing for the engine's benchmark, and the floor that times are compared with.

A floor is the larger of bytes over copy bandwidth and operations over matrix rate, both measured on the device.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
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
    """A large copy and a large matrix product."""
    large = device.type == "cuda"
    values = torch.ones((1 << 30 if large else 1 << 26) // 4, device=device)
    target = torch.empty_like(values)
    copy_ms = statistics.median(timed(lambda: target.copy_(values), repeats, device))
    side = 8192 if large else 1024
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    product_ms = statistics.median(timed(lambda: a @ b, repeats, device))
    return Floor(2 * values.nbytes / copy_ms, 2 * side**3 / product_ms)
