"""SVG drawing by hand: text, lines, bars and the style that all of the project's pictures share.

Pictures read in light and in dark surroundings, print their own labels and use colours that people with a
colour vision deficiency can tell apart (M. Okabe and K. Ito, Color universal design, 2008). It knows nothing of
what is drawn. Lengths are CSS pixels, or text such as `40%` where SVG takes a share of the width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

from tempovlm.core.request import STAGES

STAGE_COLORS = dict(zip(STAGES, ("#8b949e", "#cc79a7", "#0072b2", "#56b4e9", "#009e73", "#e69f00"), strict=True))
STAGE_NAMES = dict(zip(STAGES, ("preprocess", "control", "vision", "projector", "prefill", "decode"), strict=True))
_DARK_LABELS = frozenset(("projector", "decode", "preprocess", "control"))

RAMP = ("#d3e6f5", "#9ecae8", "#5ba3d6", "#2676b8", "#0b4a86")
"""One hue from light to dark for ordered values."""

VARIABLES = """
--ink:#1b1f24;--muted:#59636e;--faint:#d5dae0;--grid:#e9ecf0;--paper:#ffffff;
--accent:#0072b2;--good:#00734f;--bad:#b83a00;--reference:#7a4b94;
"""
DARK_VARIABLES = """
--ink:#e9ecf0;--muted:#a3adb8;--faint:#454d57;--grid:#252b32;--paper:#14181d;
--accent:#56b4e9;--good:#3ecf9b;--bad:#ff9a5c;--reference:#cf9fe8;
"""
FONT = 'system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","DejaVu Sans",Arial,sans-serif'

CLASSES = """
.tv text{font-family:FONT;font-size:13px;fill:var(--ink)}
.tv .muted{fill:var(--muted)}.tv .small{font-size:12px}.tv .tiny{font-size:11px}
.tv .strong{font-weight:600}.tv .title{font-size:15px;font-weight:600}.tv .big{font-size:18px;font-weight:600}
.tv .good{fill:var(--good)}.tv .bad{fill:var(--bad)}.tv .reference{fill:var(--reference)}
.tv .label{paint-order:stroke;stroke:var(--paper);stroke-width:4px;stroke-linejoin:round}
.tv .on-light{fill:#11161b}.tv .on-dark{fill:#ffffff}
.tv .paper{fill:var(--paper)}.tv .point{fill:var(--accent);stroke:var(--paper);stroke-width:2}
.tv .hollow{fill:var(--paper);stroke:var(--reference);stroke-width:2}
.tv line,.tv path{fill:none;stroke:var(--ink)}
.tv .grid{stroke:var(--grid)}.tv .axis{stroke:var(--faint)}.tv .whisker{stroke:var(--accent);stroke-width:1.5}
.tv .interval{stroke:var(--accent);stroke-opacity:.35;stroke-width:5}
.tv .interval-reference{stroke:var(--reference);stroke-opacity:.3;stroke-width:5}
.tv .whisker-reference{stroke:var(--reference);stroke-width:1.5}
.tv .trend{stroke:var(--accent);stroke-opacity:.45;stroke-width:1.5}
.tv .deadline{stroke:var(--ink);stroke-width:2}.tv .halo{stroke:var(--paper);stroke-width:5}
.tv .lead{stroke:var(--muted);stroke-dasharray:1 3}
""".replace("FONT", FONT)

STYLE = f".tv{{{VARIABLES}}}@media (prefers-color-scheme:dark){{.tv{{{DARK_VARIABLES}}}}}{CLASSES}".replace(
    "\n", ""
)

Length = float | str


def number(value: Length) -> str:
    """A coordinate as short text; text such as `40%` stays."""
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


def text(x: Length, y: Length, content: str, classes: str = "", anchor: str = "start") -> str:
    """A line of text, its baseline at `y`."""
    where = f'x="{number(x)}" y="{number(y)}"' + ("" if anchor == "start" else f' text-anchor="{anchor}"')
    style = f' class="{classes}"' if classes else ""
    return f"<text {where}{style}>{escape(content)}</text>"


def line(x1: Length, y1: Length, x2: Length, y2: Length, classes: str) -> str:
    """A straight line."""
    ends = f'x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}"'
    return f'<line {ends} class="{classes}"/>'


def rect(
    x: Length, y: Length, width: Length, height: Length, *, fill: str = "", title: str = "", rx: float = 0
) -> str:
    """A filled box, with a tooltip when `title` is given."""
    box = f'x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"'
    style = (f' rx="{number(rx)}"' if rx else "") + (f' fill="{fill}"' if fill else ' class="paper"')
    return f"<rect {box}{style}><title>{escape(title)}</title></rect>" if title else f"<rect {box}{style}/>"


def group(body: str, x: float, y: float) -> str:
    """The body moved by (x, y)."""
    return f'<g transform="translate({number(x)} {number(y)})">{body}</g>'


def inset(body: str, x: Length, y: Length, width: Length, height: Length) -> str:
    """A nested drawing, in which shares are of its own width."""
    box = f'x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"'
    return f'<svg {box} overflow="visible">{body}</svg>'


def document(body: str, width: int, height: int, description: str, *, style: str = STYLE) -> str:
    """A whole picture on its own background, as a file or inline.

    Args:
        body: fragments.
        width: in pixels; a narrower page scales the picture down.
        height: in pixels.
        description: for people who do not see it.
        style: empty where the page around it has `STYLE` already.
    """
    name = escape(description)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    )
    sheet = f"<style>{escape(style, quote=False)}</style>" if style else ""
    return (
        f'{head} class="tv" role="img" aria-label="{name}"><title>{name}</title>{sheet}'
        f"{rect(0, 0, width, height, rx=8)}{body}</svg>"
    )


def text_width(content: str, size: float = 13) -> float:
    """About how wide a text is: a little more than the mean advance of common sans-serif faces."""
    return 0.58 * size * len(content)


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers from `low` to `high`, at most `most`, in steps of 1, 2, 2.5 or 5 times a power of ten."""
    span = max(high - low, 1e-9)
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * f for f in (1, 2, 2.5, 5, 10, 20) if span / (power * f) <= most - 1)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def stage_bar(
    timings_ms: Mapping[str, float], scale_ms: float, budget_ms: float | None, width: float = 460
) -> str:
    """The stages of one answer side by side, with the deadline as a mark across them.

    The fragment is 26 px high, the bar from 4 to 22; horizontal lengths are shares of the width it is put in.

    Args:
        timings_ms: a time for each stage.
        scale_ms: what the full width stands for.
        budget_ms: where the mark goes.
        width: about how many pixels the fragment gets, to decide which labels fit.
    """
    parts: list[str] = []
    start_ms = 0.0
    mark = -1.0 if budget_ms is None else budget_ms / scale_ms * width
    for stage in STAGES:
        part_ms = timings_ms.get(stage, 0.0)
        if part_ms <= 0:
            continue
        label = f"{STAGE_NAMES[stage]} {part_ms:.0f}"
        tip = f"{STAGE_NAMES[stage]} {part_ms:.1f} ms"
        share = part_ms / scale_ms
        box = rect(_percent(start_ms / scale_ms), 4, _percent(share), 18, fill=STAGE_COLORS[stage], title=tip)
        parts.append(box)
        room, middle_px = text_width(label, 11) + 8, (start_ms + part_ms / 2) / scale_ms * width
        if share * width > room and abs(mark - middle_px) > room / 2:
            middle = _percent((start_ms + part_ms / 2) / scale_ms)
            ink = "on-light" if stage in _DARK_LABELS else "on-dark"
            parts.append(text(middle, 17, label, f"tiny bar-label {ink}", "middle"))
        start_ms += part_ms
    if budget_ms is not None and budget_ms <= scale_ms:
        at = _percent(budget_ms / scale_ms)
        parts += [line(at, 0, at, 26, "halo"), line(at, 0, at, 26, "deadline")]
    return "".join(parts)


def stage_key(x: float, y: float, *, deadline: bool = True) -> str:
    """A legend of the stages in one line, about 560 px wide."""
    parts: list[str] = []
    for stage in STAGES:
        parts += [rect(x, y - 9, 10, 10, fill=STAGE_COLORS[stage], rx=2)]
        parts += [text(x + 15, y, STAGE_NAMES[stage], "small muted")]
        x += 15 + text_width(STAGE_NAMES[stage], 12) + 16
    if deadline:
        parts += [line(x + 2, y - 11, x + 2, y + 3, "deadline"), text(x + 10, y, "deadline", "small muted")]
    return "".join(parts)


def _percent(share: float) -> str:
    return f"{100 * share:.3f}%"


def page_style(css: str) -> str:
    """The style sheet of a page with drawings, its own rules `css` among them; light or dark as the system is."""
    return (
        f":root{{color-scheme:light dark;--page:#f6f7f9;{VARIABLES}}}"
        f"@media (prefers-color-scheme:dark){{:root{{--page:#0d1013;{DARK_VARIABLES}}}}}{css}{CLASSES}"
    )
