"""What tests ask of timings without depending on how busy the machine is."""

from __future__ import annotations

from collections.abc import Mapping


def stage_gap(timings_ms: Mapping[str, float], total: str = "total") -> float:
    """Share of the total that no stage has.

    Two clocks are read one after the other, and a machine may hold the process between them: take the least of
    several answers. A stage that is not counted is missing from all of them.
    """
    stages_ms = sum(value for name, value in timings_ms.items() if name != total)
    return abs(timings_ms[total] - stages_ms) / timings_ms[total]
