"""Fixtures for unit tests: a tiny model in a folder, and an engine on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import tiny_model
from tempovlm.api import TempoVLM, load
from tempovlm.engine.engine import Engine
from tempovlm.model.prompt import Tokenizer
from timings import Ticks


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder in the published layout."""
    return tiny_model.save_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def engine(tiny_folder: Path) -> Engine:
    """An engine on the tiny model."""
    return Engine(tiny_model.build_model(), Tokenizer.load(tiny_folder / "tokenizer.json"), name="tiny")


@pytest.fixture
def model(tiny_folder: Path) -> TempoVLM:
    """The tiny model through the public door; not calibrated."""
    return load(str(tiny_folder), device="cpu", warmup=False, progress=False)


@pytest.fixture(autouse=True)
def _idle_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other processes do changes no result and adds no warning, and is looked for during a millisecond."""
    monkeypatch.setattr("tempovlm.core.machine._busy_ticks", lambda: 0)
    monkeypatch.setattr("tempovlm.core.machine.busy_cores.__defaults__", (1.0,))


@pytest.fixture(autouse=True)
def _brief_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """No answers warm a model up, and no caches are emptied before a policy is timed.

    A test of what the first answers tell asks for a round of them.
    """
    monkeypatch.setattr("tempovlm.engine.calibration.WARM_UP_ROUNDS", 0)
    monkeypatch.setattr("tempovlm.control.guard.CROWD_BYTES", 1)


def _blank(_: object, file: Any, *, format: str | None = None, **__: object) -> None:
    """Write a picture of one pixel in place of a figure that is read again."""
    if format == "png":
        Image.new("RGB", (1, 1)).save(file, "PNG")


@pytest.fixture
def no_ink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are composed but not rendered, which is matplotlib's work and half the time of a report."""
    monkeypatch.setattr("tempovlm.lab.drawing._arrange", lambda *_: None)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", _blank)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge's and the bench's reports are written without figures, which other tests draw."""
    for name in ("frontier", "gaps", "frontier_narrow", "gaps_narrow"):
        monkeypatch.setattr(f"tempovlm.lab.judge.figures.{name}", lambda *_: "")
    for name in ("knobs", "trade_off"):
        monkeypatch.setattr(f"tempovlm.lab.charts.{name}", lambda *_, **__: "")


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Ticks:
    """A clock that no machine drives, for requests and policies."""
    return Ticks.everywhere(monkeypatch)


@pytest.fixture
def picture() -> Image.Image:
    """A small picture."""
    return Image.fromarray(tiny_model.picture())


@pytest.fixture
def picture_file(tmp_path: Path, picture: Image.Image) -> Path:
    """The same picture in a file."""
    path = tmp_path / "picture.png"
    picture.save(path)
    return path
