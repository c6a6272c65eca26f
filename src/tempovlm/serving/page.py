"""The page at `/`: its files, which lie beside this module, and the figures that it draws."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.staticfiles import StaticFiles

from tempovlm.core.knobs import AXES
from tempovlm.core.units import now_ms
from tempovlm.serving.desk import Desk
from tempovlm.serving.openai.described import errors

FOLDER = Path(__file__).with_name("static")

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".webp": "image/webp",
}
"""Said here because machines disagree about them, and `nosniff` makes browsers obey."""

_HEADERS = {
    # Files keep their names from one version to the next, so browsers ask each time whether they are the same.
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class _Files(StaticFiles):
    """The files of a folder, with headers that let the page load nothing but them."""

    def file_response(self, full_path: Any, *given: Any, **named: Any) -> Response:
        """Return a file, or the word that it is the same."""
        response = super().file_response(full_path, *given, **named)
        kind = _TYPES.get(Path(full_path).suffix, "text/plain; charset=utf-8")
        response.headers.update({**_HEADERS, "Content-Type": kind})
        return response


class Page:
    """The routes of the page of one desk."""

    def __init__(self, desk: Desk, model: str) -> None:
        self._desk, self._model, self._files = desk, model, _Files(directory=FOLDER)

    def add_routes(self, app: FastAPI) -> None:
        """Add the page, its files and its figures to an app."""
        app.add_api_route("/", self.page, methods=["GET", "HEAD"], include_in_schema=False)
        app.add_api_route("/live", self.live, responses=errors(401))
        app.mount("/static", self._files)

    async def page(self, request: Request) -> Response:
        """Return the page."""
        return await self._files.get_response("index.html", request.scope)

    async def live(self) -> dict[str, Any]:
        """Return what the page shows: the model, the budgets that it can keep, and the last minutes."""
        desk = self._desk
        return {
            "model": self._model,
            "units": {name: axis.unit for name, axis in AXES.items()},
            "feasible_ms": [math.ceil(bound_ms) for bound_ms in desk.least_ms()],
            "is_ready": desk.is_ready,
            "running": desk.schedule.running,
            "num_waiting": desk.schedule.waiting,
            **desk.metrics.recent.told(now_ms()),
        }
