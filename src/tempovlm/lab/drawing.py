"""The style that all plots share, and their SVG: for light and dark pages, labelled, the same bytes each time.

Sizes are CSS pixels. Matplotlib is imported inside the functions, because answering does not need it.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempovlm.core.request import STAGES

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.backend_bases import FigureCanvasBase
    from matplotlib.figure import Figure

THEME = {
    "ink": ("#1b1f24", "#e9ecf0"),
    "muted": ("#59636e", "#a3adb8"),
    "faint": ("#d5dae0", "#454d57"),
    "grid": ("#e9ecf0", "#252b32"),
    "paper": ("#ffffff", "#14181d"),
    "good": ("#00734f", "#3ecf9b"),
    "bad": ("#b83a00", "#ff9a5c"),
    "reference": ("#7a4b94", "#cf9fe8"),
}
"""Colours by purpose, each on light and on dark pages; those of light pages are in plots.mplstyle too."""
INK, MUTED, GOOD, REFERENCE = (THEME[name][0] for name in ("ink", "muted", "good", "reference"))

STAGE_COLORS = dict(
    zip(STAGES, ("#d0d7de", "#8b949e", "#cc79a7", "#0072b2", "#56b4e9", "#009e73", "#e69f00"), strict=True)
)
"""Of the stages of an answer."""

RAMP = ("#d3e6f5", "#9ecae8", "#5ba3d6", "#2676b8", "#0b4a86")
"""One hue from light to dark for ordered values."""

FONT = 'system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","DejaVu Sans",Arial,sans-serif'

COLUMN_PX = 236.0
"""Width of a paper's column, 3.28 inches: that of CVPR, and a little less than that of IEEE and ACM."""

_PAGE_FONT = 12.0
_PAPER = {
    **dict.fromkeys(("font.size", "axes.labelsize", "axes.titlesize", "figure.titlesize"), 7.0),
    "legend.fontsize": 6.5,
    "lines.linewidth": 0.9,
    "axes.linewidth": 0.5,
    "grid.linewidth": 0.4,
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.03,
    # Type 42 embeds whole fonts; publishers refuse type 3, which is the default.
    "pdf.fonttype": 42,
}

_STYLE = Path(__file__).with_name("plots.mplstyle")


def can_draw() -> bool:
    """Whether matplotlib is installed; logs the remedy in one line if it is not."""
    if find_spec("matplotlib") is not None:
        return True
    logging.getLogger("tempovlm").warning("matplotlib is not installed: no figures; pip install matplotlib")
    return False


@contextmanager
def style(*, paper: bool = False) -> Iterator[None]:
    """Sets the style while a figure is made and saved, as a decorator too; colours `C0` to `C11` are its cycle.

    Args:
        paper: small type for a figure of the width `COLUMN_PX`.
    """
    import matplotlib.style

    # The default comes first, so that a user's own settings change no figure.
    with matplotlib.style.context(("default", _STYLE, *([_PAPER] if paper else []))):
        yield


def zoom() -> float:
    """Size of marks and lines relative to those on a page: below 1 in the style for papers."""
    from matplotlib import rcParams

    return float(rcParams["font.size"]) / _PAGE_FONT


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure of a size in CSS pixels, so that a font size is in pixels too."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), dpi=72)


def save_png(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG of 256 colours, one and a half times as large as its CSS pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    figure.set_dpi(108)
    _arrange(figure, FigureCanvasAgg)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=108)
    with Image.open(buffer) as drawn:
        drawn.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, format="PNG", optimize=True)


def _arrange(figure: Figure, canvas: type[FigureCanvasBase]) -> None:
    """Places what a figure holds, as its format measures text; left to `savefig`, all is drawn twice."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    canvas(figure)
    ConstrainedLayoutEngine().execute(figure)


def mark_log(axis: Axis) -> None:
    """Marks a logarithmic axis, once its data are drawn, at round numbers that it writes out."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    low, high = sorted(axis.get_view_interval())
    subs = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)
    axis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)) if high < 2.5 * low else LogLocator(subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def tip(artist: Any, text: str) -> None:
    """Gives a drawn thing a tooltip, which `to_svg` writes."""
    artist.set_gid(f"tip:{text}")


def to_pdf(figure: Figure, title: str) -> bytes:
    """Renders a figure as a PDF page of its own size, the same bytes each time."""
    from matplotlib.backends.backend_pdf import FigureCanvasPdf

    _arrange(figure, FigureCanvasPdf)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="pdf", metadata={"Title": title, "CreationDate": None, "Producer": None})
    return buffer.getvalue()


def to_svg(figure: Figure, title: str, *, theme: bool = True) -> str:
    """Renders a figure as an SVG element.

    Args:
        figure: drawn within `style`.
        title: describes it to people who do not see it.
        theme: whether it includes the colours of `THEME`; False inside a page that defines them.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    _arrange(figure, FigureCanvasSVG)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    body = buffer.getvalue().partition("<svg")[2].partition(">")[2]
    body = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>| transform=\"rotate\(-0 [^\"]*\"", "", body, flags=re.S
    )
    # A page holds several figures, in which these numbered ids would be the same; nothing refers to them.
    body = re.sub(r' id="(?!C[\da-f]+_)\w+_\d+"', "", body)
    body = re.sub(r'<g id="tip:([^"]*)">', r"<g><title>\1</title>", body).replace("xlink:href", "href")
    body = re.sub(r"\s*\n\s*", " ", body.replace("'DejaVu Sans'", "var(--font)"))
    body = body.replace("> <", ">\n<")
    for name, (light, _) in THEME.items():
        body = body.replace(light, f"var(--{name})")
    width, height = (round(72 * length) for length in figure.get_size_inches())
    name = escape(title)
    box = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    drawn = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {box} class="plot" role="img" aria-label="{name}" '
        f'stroke-linejoin="round"><title>{name}</title>{body}'
    )
    return with_theme(drawn) if theme else drawn


def with_theme(svg: str) -> str:
    """Returns what `to_svg` made for a page, with the colours of `THEME` of its own."""
    sheet = f"<style>{escape(theme_css('.plot'), quote=False)}</style>"
    return svg.replace("</title>", f"</title>{sheet}", 1)


def theme_css(selector: str) -> str:
    """Rules that define `THEME` and the font as custom properties of a selector, for light and dark pages."""
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in THEME.items()) for i in (0, 1))
    return f"{selector}{{--font:{FONT};{light}}}@media (prefers-color-scheme:dark){{{selector}{{{dark}}}}}"


def describe(stamp: Mapping[str, Any]) -> str:
    """Names the machine, the model and whose data, in a few words."""
    if not stamp:
        return "results without a stamp"
    source = stamp.get("data_source")
    return f"{stamp['model']} on {stamp['hardware']}, {stamp['device']}" + (f", {source} data" if source else "")
