"""Figures of the latency estimator: predicted against measured, reliability, error by setting, transfer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tempovlm.lab.drawing import INK, describe, mark_log, new_figure, save_png, style
from tempovlm.lab.exp1_estimator.data import Rows, Split
from tempovlm.latency.conformal import coverage
from tempovlm.latency.cores import LEVELS
from tempovlm.latency.estimator import Estimator
from tempovlm.latency.features import STAGES

_POINTS = 4000
"""Maximum number of points in a scatter plot; more only make the file large."""


@style()
def draw_report(
    folder: Path, candidates: Mapping[str, Estimator], split: Split, winner: str, stamp: Mapping[str, Any]
) -> None:
    """Writes `predicted_vs_measured.png`, `reliability.png` and `error_by_setting.png` of the winner."""
    best = candidates[winner]
    note = f"{winner}; {describe(stamp)}"
    tests = {"unseen pictures": split.test, "unseen settings": split.held_out}
    tests = {name: rows for name, rows in tests.items() if len(rows)}
    _scatter(folder / "predicted_vs_measured.png", best, tests, note)
    _reliability(folder / "reliability.png", best, tests, note)
    _heatmap(folder / "error_by_setting.png", best, list(tests.values()), note)


def _scatter(path: Path, best: Estimator, tests: Mapping[str, Rows], note: str) -> None:
    figure = new_figure(250 * len(STAGES), 300)
    panels = figure.subplots(1, len(STAGES))
    for i, (stage, axes) in enumerate(zip(STAGES, panels, strict=True)):
        for name, rows in tests.items():
            known = np.flatnonzero(np.isfinite(rows.ms[:, i]))[:_POINTS]
            predicted = best.predict(rows.workload).ms[known, i, 0]
            axes.scatter(rows.ms[known, i], predicted, s=4, alpha=0.5, label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        measured = np.concatenate([rows.ms[:, i] for rows in tests.values()])
        if np.isfinite(measured).any():
            ends = np.nanmin(measured), np.nanmax(measured)
            axes.plot(ends, ends, color=INK, lw=0.8)
        mark_log(axes.xaxis)
        mark_log(axes.yaxis)
        axes.set_title(stage)
        axes.set_xlabel("measured ms")
    panels[0].set_ylabel("predicted median ms")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, markerscale=3)
    figure.suptitle(note)
    save_png(figure, path)


def _reliability(path: Path, best: Estimator, tests: Mapping[str, Rows], note: str) -> None:
    figure = new_figure(460 * len(tests), 380)
    for (name, rows), axes in zip(tests.items(), figure.subplots(1, len(tests), squeeze=False)[0], strict=True):
        single = rows.single
        shares = coverage(single.ms, best.predict(single.workload).ms)
        for i, stage in enumerate(STAGES):
            axes.plot(LEVELS, shares[i], marker="o", label=stage)
        axes.plot((0.4, 1), (0.4, 1), color=INK, lw=0.8)
        axes.set_title(name)
        axes.set_xlabel("predicted level")
        axes.set_ylabel("share of measurements at or below")
        axes.legend()
    figure.suptitle(note)
    save_png(figure, path)


def _heatmap(path: Path, best: Estimator, parts: Sequence[Rows], note: str) -> None:
    space = best.space
    shape = space.shape
    errors = [np.abs(best.predict(p.workload).ms[:, :, 0] / p.ms - 1) for p in parts]
    settings = np.concatenate([p.workload.setting for p in parts])
    every = np.concatenate(errors)[:, STAGES.index("prefill")]
    figure = new_figure(340 * shape[0], 320)
    panels = figure.subplots(1, shape[0], squeeze=False)[0]
    table = np.full(len(space), np.nan)
    for i in range(len(space)):
        here = every[settings == i]
        table[i] = np.nanmedian(here) if np.isfinite(here).any() else np.nan
    cube = 100 * table.reshape(shape)
    top = np.nanmax(cube) if np.isfinite(cube).any() else 1.0
    for tier, (name, axes) in enumerate(zip(space.tiers, panels, strict=True)):
        axes.imshow(cube[tier], vmin=0, vmax=top, cmap="viridis", aspect="auto")
        axes.grid(visible=False)
        for (row, col), value in np.ndenumerate(cube[tier]):
            if np.isfinite(value):
                ink = "white" if value < 0.6 * top else INK
                axes.text(col, row, f"{value:.1f}", ha="center", va="center", color=ink, fontsize=11)
        axes.set_xticks(range(shape[2]), [str(n) for n in space.block_counts])
        axes.set_yticks(range(shape[1]), [str(k) for k in space.top_ks])
        axes.set_xlabel("blocks")
        axes.set_title(name)
    panels[0].set_ylabel("top-k")
    figure.suptitle(f"prefill, median error in % on unseen pictures\n{note}")
    save_png(figure, path)


@style()
def draw_transfer(
    path: Path, curve: Sequence[Mapping[str, Any]], old: Mapping[str, Any], new: Mapping[str, Any]
) -> None:
    """Draws error against number of measurements, a line for each stage with the range over seeds."""
    figure = new_figure(640, 420)
    axes = figure.add_subplot()
    counts = [row["measurements"] for row in curve]
    for name in (*STAGES, "total"):
        cells = [row["median_ape"].get(name) for row in curve]
        if None in cells:
            continue
        middle, least, most = ([cell[key] for cell in cells] for key in ("median", "least", "most"))
        (line,) = axes.plot(counts, middle, marker="o", label=name)
        axes.fill_between(counts, least, most, alpha=0.15, color=line.get_color())
    axes.axhline(0.05, color=INK, lw=0.8, ls="--")
    axes.set_yscale("log")
    mark_log(axes.yaxis)
    axes.set_xlabel("measurements on the new device")
    axes.set_ylabel("median relative error")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02))
    figure.suptitle(f"{describe(old)}\n→ {describe(new)}")
    save_png(figure, path)
