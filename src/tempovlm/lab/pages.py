"""Renders the templates in `templates/`: self-contained pages and pictures, in which every value is escaped."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempovlm.lab.drawing import theme_css

if TYPE_CHECKING:
    from jinja2 import Environment

    from tempovlm.lab.bench.showcase import Example

ALPHA = 0.05
"""Largest corrected p-value at which a difference holds."""


_WORDS = {
    "hardware": "machine",
    "os": "operating system",
    "created": "measured on",
    "weights": "hash of the weights",
    "knob_space": "hash of the knob space",
    "tempovlm": "version of TempoVLM",
    "data_source": "source of the data",
}
"""Fields of a stamp in words."""


def render(template: str, **values: Any) -> str:
    """Fills a template; a value that it names and does not get is an error."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tempovlm.lab"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(theme_css=theme_css, alpha=ALPHA)
    environment.filters.update(
        command=command,
        data_uri=data_uri,
        flatten=flatten,
        g=lambda value: f"{value:g}",
        held=held,
        ms=lambda value: "" if value is None else f"{value:.0f} ms",
        percent=lambda share: "" if share is None else f"{100 * share:.1f} %",
        points=points,
        probability=lambda value: f"{value:.3f}" if value > 0.001 else "≤ 0.001",
        times100=lambda share, digits=1: f"{100 * share:.{digits}f}",
        verdict=verdict,
    )
    return environment


def points(share: float) -> str:
    """A signed number of points."""
    shown = round(100 * share, 1)
    return f"{shown:+.1f}" if shown else "0.0"


def verdict(gain: Mapping[str, Any]) -> str:
    """`good` or `bad` where the interval lies above or below zero."""
    low, high = gain["interval"]
    return "good" if low > 0 else "bad" if high < 0 else ""


def held(gain: Mapping[str, Any]) -> int:
    """1 above, -1 below, 0 where the difference does not hold after the correction."""
    if gain["holm_p_value"] > ALPHA:
        return 0
    return 1 if gain["value"] > 0 else -1


def flatten(facts: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Turns nested values into one level of names in words, such as `versions, torch`; leaves out the unknown."""
    flat: dict[str, str] = {}
    for name, value in facts.items():
        full = f"{prefix}{_WORDS.get(name, name.replace('_', ' '))}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{full}, ")
        elif isinstance(value, list | tuple):
            flat[full] = ", ".join(str(item) for item in value)
        elif value is not None and value != "":
            flat[full] = str(value)
    return flat


def command(example: Example, budget_ms: float) -> str:
    """The command that asks an example's question within a budget, for a shell."""
    sample = example.sample
    words = ["tempovlm", "answer", str(sample.image_path), sample.question, "--budget_ms", f"{budget_ms:g}"]
    return shlex.join([*words, "--style", sample.style])


def data_uri(path: Path) -> str:
    """A JPEG file as a URI that carries it."""
    return "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
