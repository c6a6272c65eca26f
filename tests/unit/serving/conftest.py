"""A server on the tiny model, whose profile is made up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import tiny_model
from asgi import encoded, url_of
from tempovlm.api import TempoVLM, load
from tempovlm.engine import calibration


@pytest.fixture(scope="session")
def served(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TempoVLM:
    """The tiny model, calibrated by numbers that are made up: from about 15 ms to 50."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEMPOVLM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(calibration, "measure", lambda *_, **__: tiny_model.make_profile().measurements)
        model = load(str(tiny_folder), device="cpu", warmup=False, progress=False)
        model.calibrate()
        return model


@pytest.fixture
def app_of(served: TempoVLM, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes an app with options; pictures open in no time."""
    from tempovlm.serving import desk
    from tempovlm.serving.app import create_app
    from tempovlm.serving.options import Options

    monkeypatch.setattr(desk, "OpeningTimes", lambda: SimpleNamespace(of=lambda _: 0.0, observe=lambda *_: None))
    return lambda **options: create_app(served, Options(**options))


@pytest.fixture
def app(app_of: Callable[..., Any]) -> Any:
    """An app as it is by default."""
    return app_of()


@pytest.fixture
def part(picture: Image.Image) -> dict[str, Any]:
    """A small picture as a part of a message."""
    return {"type": "image_url", "image_url": {"url": url_of(encoded(picture))}}
