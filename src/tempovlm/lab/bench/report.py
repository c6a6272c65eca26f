"""The demo's page and the README's figure: pictures, their answers at several budgets, and the time of each stage.

Both embed their pictures and load nothing from the network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from tempovlm.core.knobs import AXES
from tempovlm.core.request import STAGES
from tempovlm.lab import charts
from tempovlm.lab.bench.showcase import Example, Shown
from tempovlm.lab.drawing import STAGE_COLORS, can_draw
from tempovlm.lab.pages import render as render_template

_NAMES = dict(
    zip(STAGES, ("queue", "preprocess", "control", "vision", "projector", "prefill", "decode"), strict=True)
)
_KEY_LEFTS = (0, 101, 180, 253, 347, 427)
_ON_DARK = frozenset(("vision_encoder", "prefill"))
_BAR_PX = 480
_LETTER_PX = 6.4
_PHOTO_PX = 340
_LONGEST = 16
_SHOWN_MS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Contents of the demo's page.

    Attributes:
        examples: each with its answers, from the tightest budget to the loosest.
        bench: the result object of a bench.
        facts: provenance, nested, by name.
    """

    examples: Sequence[tuple[Example, Sequence[Shown]]]
    bench: Mapping[str, Any]
    facts: Mapping[str, Any]


def render(report: Report) -> str:
    """Renders the demo's page; without matplotlib it lacks the plot of the bench."""
    is_drawn = can_draw()
    return render_template(
        "demo.html",
        cards=[(example, _rows(shown)) for example, shown in report.examples],
        stages=[(_NAMES[stage], STAGE_COLORS[stage]) for stage in STAGES],
        bench={"fixed": None, **report.bench},
        plot=charts.trade_off(report.bench, theme=False) if is_drawn else "",
        plot_narrow=charts.trade_off_narrow(report.bench) if is_drawn else "",
        facts=report.facts,
    )


def answer_figure(example: Example, shown: Sequence[Shown], footer: str) -> str:
    """Renders one question at several budgets as an SVG file with its photo.

    Args:
        example: the picture and the question.
        shown: its answers, a row each.
        footer: source of the figures, in one line.
    """
    with Image.open(example.path) as image:
        photo_height = round(_PHOTO_PX * image.height / image.width)
    spoken = "; ".join(f"{one.budget_ms:g} ms: {one.answer.text}" for one in shown)
    return render_template(
        "answer.svg",
        example=example,
        rows=_rows(shown),
        stages=_key(),
        photo_height=photo_height,
        height=max(108 + 84 * len(shown) + 52, photo_height + 56),
        spoken=f"{example.question} {spoken}",
        footer=footer,
    )


def _key() -> list[tuple[str, str, int]]:
    """Each stage's name and colour, and where it stands in the key; answers here never waited in a queue."""
    return [(_NAMES[stage], STAGE_COLORS[stage], left) for stage, left in zip(STAGES[1:], _KEY_LEFTS, strict=True)]


def _rows(shown: Sequence[Shown]) -> list[dict[str, Any]]:
    """Return an example's answers for the templates, all bars on one scale."""
    scale_ms = 1.01 * max(max(one.answer.timings_ms["total"], one.budget_ms) for one in shown)
    return [_row(one, scale_ms) for one in shown]


def _row(shown: Shown, scale_ms: float) -> dict[str, Any]:
    answer, knobs = shown.answer, shown.answer.knobs
    said = shown.spoken or "(nothing)"
    return {
        "shown": shown,
        "total_ms": answer.timings_ms["total"],
        "setting": " · ".join(
            f"{value} {knob.unit}" for knob, value in zip(AXES.values(), knobs.values, strict=True)
        ),
        "said": said if len(said) <= _LONGEST else said[: _LONGEST - 1].rstrip() + "…",
        "deadline": round(100 * shown.budget_ms / scale_ms, 3),
        "parts": stage_parts(answer.timings_ms, scale_ms, shown.budget_ms),
    }


def stage_parts(timings_ms: Mapping[str, float], scale_ms: float, budget_ms: float) -> list[dict[str, Any]]:
    """Place the stages of one answer side by side.

    Args:
        timings_ms: a time for each stage.
        scale_ms: time that the full width represents.
        budget_ms: position of the deadline's mark, which no label may touch.

    Returns:
        For each stage that took 0.05 ms or more: name, colour, ms, and its left end, middle and width in percent;
        the label is empty if it does not fit.
    """
    parts: list[dict[str, Any]] = []
    start_ms = 0.0
    for stage in STAGES:
        part_ms = timings_ms.get(stage, 0.0)
        if part_ms < _SHOWN_MS:
            continue
        label, middle_ms = f"{_NAMES[stage]} {part_ms:.0f}", start_ms + part_ms / 2
        room_ms = (_LETTER_PX * len(label) + 8) / _BAR_PX * scale_ms
        fits = part_ms > room_ms and abs(budget_ms - middle_ms) > room_ms / 2
        places = {"left": start_ms, "middle": middle_ms, "width": part_ms}
        parts.append(
            {
                "name": _NAMES[stage],
                "color": STAGE_COLORS[stage],
                "ink": "#ffffff" if stage in _ON_DARK else "#11161b",
                "ms": part_ms,
                "label": label if fits else "",
                **{name: round(100 * place_ms / scale_ms, 3) for name, place_ms in places.items()},
            }
        )
        start_ms += part_ms
    return parts
