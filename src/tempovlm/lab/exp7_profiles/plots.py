"""Figures of a table of settings: accuracy against latency, and where the time goes. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempovlm.core.knobs import TIERS
from tempovlm.core.records import STAGE_FIELDS
from tempovlm.lab.exp7_profiles.summary import frontier

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {"low": "#4477aa", "medium": "#ccbb44", "high": "#aa3377"}
STAGE_COLORS = ("#bbbbbb", "#4477aa", "#66ccee", "#228833", "#ee6677")

_LABELS = {field: stage.replace("_", " ") for stage, field in STAGE_FIELDS.items() if stage != "total"}


def save_plots(folder: Path, records: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write `frontier.png` and `stages.png` and return their paths."""
    paths = []
    for name, figure in (("frontier", draw_frontier(records)), ("stages", draw_stages(records))):
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=120)
    return paths


def draw_frontier(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Every setting's accuracy with its interval over its median total, and the settings worth choosing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    timed = [one for one in records if one["T_total_p50"] is not None]
    for tier in TIERS:
        some = [one for one in timed if one["tier"] == tier]
        if some:
            middle = [one["accuracy"] for one in some]
            low = [max(one["accuracy"] - one["accuracy_interval"][0], 0) for one in some]
            high = [max(one["accuracy_interval"][1] - one["accuracy"], 0) for one in some]
            times_ms = [one["T_total_p50"] for one in some]
            style: dict[str, Any] = {"fmt": "o", "ms": 4, "lw": 0.6, "alpha": 0.8}
            axes.errorbar(times_ms, middle, (low, high), color=COLORS[tier], label=tier, **style)
    best = frontier(timed)
    axes.step([one["T_total_p50"] for one in best], [one["accuracy"] for one in best], "k-", where="post", lw=1)
    axes.set_xlabel("median total, ms")
    axes.set_ylabel("accuracy, with 95 % interval")
    axes.set_title(_title(records), fontsize=9)
    axes.legend(title="tier", frameon=False)
    axes.grid(alpha=0.2)
    return figure


def draw_stages(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Mean time of each stage at every setting, a panel for each tier."""
    from matplotlib.figure import Figure

    tiers = [tier for tier in TIERS if any(one["tier"] == tier for one in records)]
    figure = Figure(figsize=(4.2 * len(tiers), 6.4), layout="constrained")
    panels = figure.subplots(1, len(tiers), squeeze=False, sharex=True)[0]
    for axes, tier in zip(panels, tiers, strict=True):
        some = [one for one in records if one["tier"] == tier]
        places, start_ms = range(len(some)), [0.0] * len(some)
        for (field, label), color in zip(_LABELS.items(), STAGE_COLORS, strict=True):
            part_ms = [one[field] or 0.0 for one in some]
            axes.barh(places, part_ms, left=start_ms, color=color, label=label)
            start_ms = [a + b for a, b in zip(start_ms, part_ms, strict=True)]
        axes.set_yticks(places, [f"k{one['top_k']} b{one['num_blocks']}" for one in some], fontsize=6)
        axes.set_title(tier)
        axes.set_xlabel("mean ms")
    panels[0].legend(frameon=False, fontsize=7)
    figure.suptitle(_title(records), fontsize=9)
    return figure


def _title(records: Sequence[Mapping[str, Any]]) -> str:
    one = records[0]
    stamp = one["stamp"] or {"model": "unknown model", "hardware": "unknown machine"}
    asked, timed = (max(record[name] for record in records) for name in ("num_samples", "num_latency_samples"))
    about = f"{one['dataset']} ({one['data_source']}), {asked} questions, {timed} timed"
    return f"{about} · {stamp['model']} on {stamp['hardware']}"
