"""The routes of the HTTP API, as an ASGI app around one loaded model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from tempovlm import __version__
from tempovlm.core.request import Answer
from tempovlm.engine.transcript import Token
from tempovlm.serving.desk import Answering, Desk
from tempovlm.serving.errors import ApiError
from tempovlm.serving.gate import (
    ANSWER,
    ARRIVED,
    ASK,
    CODE,
    ENDED,
    HEADERS,
    OWNER,
    REQUEST_ID,
    Gate,
    error_response,
)
from tempovlm.serving.intake.asks import Ask, Intake
from tempovlm.serving.intake.body import Gone, Receive, parse, read_body
from tempovlm.serving.intake.budget import split_alias
from tempovlm.serving.openai.chat import ChatReply, ChatRequest, event
from tempovlm.serving.openai.described import asking, described, errors
from tempovlm.serving.openai.responses import ResponsesReply, ResponsesRequest
from tempovlm.serving.options import Options
from tempovlm.serving.page import Page

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tempovlm.api import TempoVLM
    from tempovlm.serving.intake.asks import Fields

_LARGE_BYTES = 1 << 18
"""A larger body is parsed beside the event loop; a hop to a thread would be a third of a small refusal."""

_PARSERS, _FETCHERS = 2, 8
"""Threads for that: each holds a body three times while it is parsed; fetching pictures is mostly waiting."""

_CLIENT_LEFT = 499


class Body(Protocol):
    """A parsed body of one of the APIs."""

    def fields(self) -> Fields:
        """Return what is asked."""


class Reply(Protocol):
    """Writes one answer in the form of one of the APIs."""

    def whole(self, answer: Answer) -> dict[str, Any]:
        """Return the whole answer."""

    def opening(self) -> Iterator[str]:
        """Yield the events before the first token."""

    def piece(self, text: str) -> Iterator[str]:
        """Yield the events of a piece of text."""

    def closing(self, answer: Answer) -> Iterator[str]:
        """Yield the events after the last token."""


def create_app(model: TempoVLM, options: Options | None = None) -> FastAPI:
    """Return an app that serves a model; measures the machine first if that was not done.

    `app.state.desk` is the `Desk`, whose `is_draining` makes it refuse what comes from then on.
    """
    service = Service(model, options or Options())
    given = service.options
    # A redirect to a path with a slash would name the host that the client named.
    app = FastAPI(title="TempoVLM", version=__version__, openapi_url=None, redirect_slashes=False)
    app.state.desk = service.desk
    app.add_middleware(Gate, options=given, refused=service.desk.metrics.refused, out=service.desk.out.observe)
    if given.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(given.allow_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After", "retry-after-ms", "x-should-retry"],
        )
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    service.add_routes(app)
    return app


async def _on_api_error(request: Request, error: Any) -> Response:
    request.scope["state"][CODE] = error.code
    return error_response(error)


async def _on_http_error(request: Request, error: Any) -> Response:
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    return await _on_api_error(request, ApiError(error.status_code, code, error.detail, None, error.headers))


class Service:
    """The functions behind the routes."""

    def __init__(self, model: TempoVLM, options: Options) -> None:
        self.options = options
        self.desk = Desk(model, options)
        self._intake = Intake(model, options)
        threads = _FETCHERS if options.allow_remote_images else _PARSERS
        self._parsers = ThreadPoolExecutor(threads, thread_name_prefix="parse")
        self._name = model.engine.name
        self._context = model.engine.runner.model.config.max_sequence_length

    def add_routes(self, app: FastAPI) -> None:
        """Add all routes to an app."""
        add, ask = app.add_api_route, app.router.add_api_route
        for path, function, kind in (
            ("/v1/chat/completions", self.chat, ChatRequest),
            ("/v1/responses", self.responses, ResponsesRequest),
        ):
            ask(path, function, methods=["POST"], route_class_override=_Direct, **asking(kind, stream=True))
        add("/v1/models", self.models, responses=errors(401))
        add("/v1/models/{name:path}", self.model, responses=errors(401, 404))
        for path in ("/health", "/version"):
            add(path, getattr(self, path[1:]))
        add("/ready", self.ready, responses={503: {"description": "not ready"}})
        add("/metrics", self.metrics, response_class=PlainTextResponse)
        for probe in (self.health, self.version, self.ready, self.metrics):  # load balancers ask for no body
            add(f"/{probe.__name__}", probe, methods=["HEAD"], include_in_schema=False)
        if self.options.allow_calibrate:
            add("/calibrate", self.calibrate, methods=["POST"], responses=errors(401, 503))
        Page(self.desk, self._name).add_routes(app)
        description = described(app, ChatRequest, ResponsesRequest)
        add("/openapi.json", lambda: JSONResponse(description), include_in_schema=False)

    async def chat(self, request: Request) -> Response:
        """Answer a question about a picture as a chat completion."""
        return await self._answer(request, ChatRequest, ChatReply)

    async def responses(self, request: Request) -> Response:
        """Answer a question about a picture as a response."""
        return await self._answer(request, ResponsesRequest, ResponsesReply)

    async def models(self) -> dict[str, Any]:
        """List the model, and aliases of it with budgets; other budgets work too."""
        names = (self._name, *(f"{self._name}@{budget_ms:g}ms" for budget_ms in self.options.aliases_ms))
        return {"object": "list", "data": [self._about(name) for name in names]}

    async def model(self, name: str) -> dict[str, Any]:
        """Describe the model, by its name or any alias."""
        if split_alias(name)[0] != self._name:
            raise ApiError(404, "model_not_found", f"this server has the model {self._name}", "model")
        return self._about(name)

    def _about(self, name: str) -> dict[str, Any]:
        about = {"id": name, "object": "model", "created": 0, "owned_by": "tempovlm"}
        return about | {"root": self._name, "max_model_len": self._context}

    async def health(self) -> dict[str, str]:
        """Say that the process lives."""
        return {"status": "ok"}

    async def ready(self) -> Response:
        """Say whether questions are taken: 200, or 503 while the server ends or the machine is measured."""
        is_ready = self.desk.is_ready
        return JSONResponse({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)

    async def version(self) -> dict[str, str]:
        """Return the version."""
        return {"version": __version__}

    async def metrics(self) -> Response:
        """Return the metrics in Prometheus's text format."""
        return PlainTextResponse(self.desk.metrics.text(), media_type="text/plain; version=0.0.4")

    async def calibrate(self) -> dict[str, float]:
        """Measure the machine anew; no question is taken meanwhile."""
        least_ms, most_ms = await self.desk.calibrate()
        return {"feasible_from_ms": least_ms, "everything_fits_from_ms": most_ms}

    async def _answer(self, request: Request, kind: type[Any], reply_of: Callable[[Ask], Reply]) -> Response:
        """Read, admit and answer a request.

        Raises:
            ApiError: it is invalid, or refused.
        """
        state, desk = request.scope["state"], self.desk
        desk.check_open()
        try:
            state[ASK] = ask = await self._read(request, kind)
        except Gone:
            state[CODE] = "client_left"
            return Response(status_code=_CLIENT_LEFT)
        await desk.prepare(ask)
        answering = desk.answer(ask, desk.admit(ask, state[ARRIVED], state[OWNER]))
        items, watch = answering.items(), asyncio.create_task(_watch(request.receive, answering))
        try:
            first = await anext(items)
        except BaseException:
            answering.leave()
            watch.cancel()
            raise
        if ask.stream:
            return _Events(_events(first, items, reply_of(ask), state), answering, watch)
        watch.cancel()
        assert isinstance(first, Answer)
        state[ANSWER], state[ENDED] = first, answering.ended_ms
        if answering.is_left():
            return Response(status_code=_CLIENT_LEFT)
        return JSONResponse(reply_of(ask).whole(first))

    async def _read(self, request: Request, kind: type[Any]) -> Ask:
        headers, options = request.scope["state"][HEADERS], self.options
        data = await read_body(request.receive, headers, options.max_body_bytes, options.body_timeout_ms)
        name = request.scope["state"][REQUEST_ID]

        def ask() -> Ask:
            size = len(data)
            fields = parse(data, kind).fields()
            data.clear()
            found = self._intake.ask(fields, headers, name)
            del fields
            self.desk.trim.count(size)
            return found

        may_block = len(data) > _LARGE_BYTES or options.allow_remote_images
        return await asyncio.get_running_loop().run_in_executor(self._parsers, ask) if may_block else ask()


class _Direct(APIRoute):
    """A route whose function gets the request as it came: it reads and checks the body itself."""

    def __init__(self, path: str, endpoint: Callable[[Request], Awaitable[Response]], **given: Any) -> None:
        super().__init__(path, endpoint, **given)

        async def answer(scope: Any, receive: Any, send: Any) -> None:
            response = await endpoint(Request(scope, receive))
            await response(scope, receive, send)

        self.app = answer


async def _watch(receive: Receive, answering: Answering) -> None:
    """Let the answer end where its client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass
    answering.leave()


class _Events(StreamingResponse):
    """A stream that ends its answer where it ends itself, and leaves the watch for the client to its own."""

    def __init__(self, events: AsyncIterator[str], answering: Answering, watch: asyncio.Task[None]) -> None:
        # A proxy that collects a response would hide its stream.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._answering, self._watched = answering, watch

    async def __call__(self, _scope: Any, _receive: Any, send: Any) -> None:
        """Send the events."""
        try:
            await self.stream_response(send)
        except OSError:  # the client left
            pass
        finally:
            self._answering.leave()
            self._watched.cancel()


async def _events(
    first: Token | Answer, items: AsyncIterator[Token | Answer], reply: Reply, state: dict[str, Any]
) -> AsyncIterator[str]:
    """Yield the events of an answer; an error that comes later than the first token is an event too."""
    for text in reply.opening():
        yield text
    item = first
    try:
        while not isinstance(item, Answer):
            for text in reply.piece(item.text):
                yield text
            item = await anext(items)
    except ApiError as error:
        state[CODE] = error.code
        yield event(error.body())
        return
    state[ANSWER] = item
    for text in reply.closing(item):
        yield text
