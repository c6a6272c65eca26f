"""Figures of a table of settings: accuracy against latency, and where the time goes. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempovlm.core.knobs import TIERS
from tempovlm.core.records import STAGE_FIELDS
from tempovlm.lab.drawing import INK, STAGE_COLORS, new_figure, save_png, style
from tempovlm.lab.exp7_profiles.summary import frontier

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FIELDS = {stage: field for stage, field in STAGE_FIELDS.items() if stage != "total"}


@style()
def save_plots(folder: Path, records: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Writes `frontier.png` and `stages.png` and returns their paths."""
    figures = {"frontier.png": _draw_frontier(records), "stages.png": _draw_stages(records)}
    for name, figure in figures.items():
        save_png(figure, folder / name)
    return [folder / name for name in figures]


def _draw_frontier(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws every setting's accuracy with its interval over its median total, and the settings worth choosing."""
    figure = new_figure(860, 480)
    axes = figure.add_subplot()
    timed = [one for one in records if one["T_total_p50"] is not None]
    for i, tier in enumerate(TIERS):
        some = [one for one in timed if one["tier"] == tier]
        if some:
            middle = [one["accuracy"] for one in some]
            low = [max(one["accuracy"] - one["accuracy_interval"][0], 0) for one in some]
            high = [max(one["accuracy_interval"][1] - one["accuracy"], 0) for one in some]
            times_ms = [one["T_total_p50"] for one in some]
            marks: dict[str, Any] = {"fmt": "o", "ms": 6, "lw": 1, "alpha": 0.8}
            axes.errorbar(times_ms, middle, (low, high), color=f"C{i}", label=tier, **marks)
    best = frontier(timed)
    times_ms = [one["T_total_p50"] for one in best]
    axes.step(times_ms, [one["accuracy"] for one in best], color=INK, where="post", lw=1.2)
    axes.set_xlabel("median total, ms")
    axes.set_ylabel("accuracy, with 95 % interval")
    axes.plot([], [], color=INK, lw=1.2, label="worth choosing")
    axes.legend(title="tier", loc="upper left", bbox_to_anchor=(1.01, 1.02))
    figure.suptitle(_title(records))
    return figure


def _draw_stages(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws the mean time of each stage at every setting, a panel for each tier."""
    tiers = [tier for tier in TIERS if any(one["tier"] == tier for one in records)]
    figure = new_figure(max(420 * len(tiers), 640), 640)
    panels = figure.subplots(1, len(tiers), squeeze=False, sharex=True)[0]
    for axes, tier in zip(panels, tiers, strict=True):
        some = [one for one in records if one["tier"] == tier]
        places, start_ms = range(len(some)), [0.0] * len(some)
        for stage, field in _FIELDS.items():
            part_ms = [one[field] or 0.0 for one in some]
            label = stage.replace("_", " ")
            axes.barh(places, part_ms, left=start_ms, color=STAGE_COLORS[stage], label=label)
            start_ms = [a + b for a, b in zip(start_ms, part_ms, strict=True)]
        axes.set_yticks(places, [f"k{one['top_k']} b{one['num_blocks']}" for one in some])
        axes.grid(visible=False, axis="y")
        axes.set_title(tier)
        axes.set_xlabel("mean ms")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(_FIELDS))
    figure.suptitle(_title(records))
    return figure


def _title(records: Sequence[Mapping[str, Any]]) -> str:
    one = records[0]
    stamp = one["stamp"] or {"model": "unknown model", "hardware": "unknown machine"}
    asked, timed = (max(record[name] for record in records) for name in ("num_samples", "num_latency_samples"))
    about = f"{one['dataset']} ({one['data_source']}), {asked} questions, {timed} timed"
    return f"{about}\n{stamp['model']} on {stamp['hardware']}"
