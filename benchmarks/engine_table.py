"""The engine benchmark's rows as text, and the order of times along the knobs."""

from __future__ import annotations

from typing import Any


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text."""
    lines = [f"{'':34}{'median':>10}{'p10':>10}{'p90':>10}{'floor':>10}  times  peers"]
    for row in rows:
        if row["ms_median"] is None:
            lines.append(f"{row['name']:34}  {row['reason']}")
            continue
        times_ms = "".join(f"{row[key]:10.3f}" for key in ("ms_median", "ms_p10", "ms_p90", "floor_ms"))
        over = f"{row['ms_median'] / row['floor_ms']:7.2f}" if row["floor_ms"] else " " * 7
        peers = ", ".join(f"{name} {value:.2f}" for name, value in row["peers"].items())
        lines.append(f"{row['name']:34}{times_ms}{over}  {peers}{row.get('failure', '')}")
    return "\n".join(lines)


def slower_where_faster_was_due(rows: list[dict[str, Any]]) -> list[str]:
    """Pairs of settings, one knob apart, whose dearer one was faster by over 2 %; top-k is judged by decode."""
    order = {"low": 0, "medium": 1, "high": 2}
    points = []
    for row in rows:
        if row["name"].startswith("setting_") and row["ms_median"] is not None:
            tier, top_k, blocks = row["name"].split("_")[1:]
            points.append(((order[tier], int(top_k[1:]), int(blocks[1:])), row))
    found = []
    for a, cheap in points:
        for b, dear in points:
            apart = [i for i in range(3) if a[i] != b[i]]
            if len(apart) != 1 or b < a:
                continue
            is_top_k = apart == [1]
            times_ms = [row["stages_ms"]["decode"] if is_top_k else row["ms_median"] for row in (cheap, dear)]
            if times_ms[1] < 0.98 * times_ms[0]:
                found.append(f"{dear['name']} is faster than {cheap['name']}{' in decode' * is_top_k}")
    return found
