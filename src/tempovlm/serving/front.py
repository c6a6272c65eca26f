"""Before several servers of one model: starts the clock, chooses who answers, and passes the answer on.

A replica is a whole server with a queue of its own, which admits and refuses. The front follows each one's queue
by the same `Schedule`, so it can tell where a request would end before its deadline and make nobody late.

    read the body ── where does it end in time? ──> the least loaded one of these; where there is none,
                                                      │ the least loaded one of all, which refuses it
    reply <── messages as they come ──────────────────┘
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from tempovlm.control.queue import Discipline, Schedule, Stay
from tempovlm.core.units import now_ms
from tempovlm.serving.desk import WayOut
from tempovlm.serving.errors import ApiError, later
from tempovlm.serving.gate import WAITED, Keys, error_response, headers_of, is_open
from tempovlm.serving.intake.asks import USUAL_TOKENS
from tempovlm.serving.intake.body import Gone, Receive, parse, read_body
from tempovlm.serving.intake.budget import find_budget, split_alias
from tempovlm.serving.openai.chat import Common, event
from tempovlm.serving.options import Options

INSIDE = "inside_ms"
"""Key of the last message of a replica: the time that the request was there."""

NUM_WAYS = 2
"""Ways there and back of a request: to the replica, and before that from the proxy to the front."""

KEPT_WAY = 0.9
"""Share of the last ways that take no longer than is counted on."""

MOST_WAY_MS = 20.0
"""A longer time is no way, but a wait for a replica that starts."""

_LARGE_BYTES = 1 << 18
_PASSED = ("method", "path", "raw_path", "query_string", "http_version", "scheme", "client", "server", "root_path")

Message = MutableMapping[str, Any]
Send = Callable[[Message], Any]


@dataclass(frozen=True, slots=True)
class Task:
    """A request on its way to a replica.

    Attributes:
        scope: of ASGI, as plain values. body: whole.
        waited_ms: since its headers came, with the time that its ways there and back are expected to take.
        budget_ms: None without one.
    """

    scope: dict[str, Any]
    body: bytes
    waited_ms: float
    budget_ms: float | None

    def stay(self, need_ms: float, time_ms: float) -> Stay:
        """Return the time that it takes at a replica that needs `need_ms` at least."""
        accepted_ms = time_ms - self.waited_ms
        return Stay(accepted_ms, math.inf if self.budget_ms is None else accepted_ms + self.budget_ms, need_ms)


class LostError(Exception):
    """A replica ended before its answer did."""


class Ask(Protocol):
    """Sends a task to a replica."""

    def __call__(self, task: Task) -> AsyncIterator[Message]:
        """Yield the messages of its response, and `INSIDE` last.

        Raises:
            LostError: the replica is gone.
        """


@dataclass(slots=True)
class _Replica:
    schedule: Schedule
    need_ms: float
    stays: dict[str, Stay] = field(default_factory=dict)


class Routes:
    """Follows what was sent to each replica, in any thread."""

    def __init__(self, discipline: Discipline = "edf") -> None:
        """Follow replicas that let in by a discipline."""
        self._discipline: Discipline = discipline
        self._replicas: dict[str, _Replica] = {}
        self._lock = threading.Lock()

    def tell(self, names: Iterable[str], states: Mapping[str, Mapping[str, float]]) -> None:
        """Take the replicas that live, and what they last told of themselves: `need_ms` and `lanes`."""
        with self._lock:
            known, self._replicas = self._replicas, {}
            for name in names:
                state = states.get(name) or {}
                schedule = Schedule(int(state.get("lanes", 1)), discipline=self._discipline)
                one = known.get(name) or _Replica(schedule, 0.0)
                one.need_ms = state.get("need_ms", one.need_ms)
                self._replicas[name] = one

    def ranked(self, number: str, task: Task, time_ms: float) -> list[str]:
        """Return the replicas, the best one first, and expect request `number` there.

        The best is the least loaded of those where it ends before its deadline and makes nobody late; without any
        such replica it is the least loaded one.
        """
        with self._lock:
            self._forget(number, time_ms)
            order = sorted(self._replicas, key=lambda name: self._replicas[name].schedule.drain_ms(time_ms))
            for name in order:
                one = self._replicas[name]
                stay = task.stay(one.need_ms, time_ms)
                if one.schedule.admit(stay, time_ms):
                    one.stays[number] = stay
                    return [name, *(other for other in order if other != name)]
            return order

    def ended(self, number: str, time_ms: float) -> None:
        """Say that a request has its answer, or was not sent."""
        with self._lock:
            self._forget(number, time_ms)

    def _forget(self, number: str, time_ms: float) -> None:
        for one in self._replicas.values():
            if number in one.stays:
                one.schedule.end(one.stays.pop(number), time_ms)


class Front:
    """An ASGI app that has its requests answered by replicas."""

    def __init__(self, ask: Ask, options: Options) -> None:
        self._ask, self._options, self._keys = ask, options, Keys(options.api_keys)
        self._way = WayOut()

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Pass a request on; errors have the API's form."""
        if scope["type"] != "http":
            return
        arrived_ms, passing = now_ms(), _Passing(send)
        try:
            task = await self._task(scope, receive, arrived_ms)
            await self._pass(task, receive, passing)
        except Gone:
            return
        except ApiError as error:
            await error_response(error)(dict(scope), receive, send)
        except LostError:
            message = "the replica that had this request is lost; ask again"
            await passing.end(later(503, "replica_lost", message, 0.0), scope, receive)

    async def _task(self, scope: Mapping[str, Any], receive: Receive, arrived_ms: float) -> Task:
        """Read a request."""
        headers, options = headers_of(scope), self._options
        if self._keys.owner(headers) is None and not is_open(scope["path"]):
            raise ApiError(401, "invalid_api_key", "the key in the header Authorization is missing or wrong")
        body = bytes(await read_body(receive, headers, options.max_body_bytes, options.body_timeout_ms))
        peek = (body, headers, options.default_budget_ms)
        is_large = len(body) > _LARGE_BYTES
        budget_ms = await asyncio.to_thread(_budget_ms, *peek) if is_large else _budget_ms(*peek)
        passed = {name: scope[name] for name in _PASSED if name in scope}
        passed["headers"] = [(bytes(name), bytes(value)) for name, value in scope["headers"]]
        return Task(passed, body, now_ms() - arrived_ms + NUM_WAYS * self._way.under_ms(KEPT_WAY), budget_ms)

    async def _pass(self, task: Task, receive: Receive, passing: _Passing) -> None:
        """Pass a replica's messages on until they end or the client leaves."""
        sent_ms = now_ms()

        async def answer() -> None:
            async for message in self._ask(task):
                if INSIDE in message:
                    self._way.observe(min(now_ms() - sent_ms - message[INSIDE], MOST_WAY_MS))
                else:
                    await passing(message)

        answering, leaving = asyncio.ensure_future(answer()), asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
        finally:
            answering.cancel()
            leaving.cancel()


class _Passing:
    """Sends messages, and knows how far a response is."""

    def __init__(self, send: Send) -> None:
        self._send, self._has_begun, self._is_stream, self._is_over = send, False, False, False

    async def __call__(self, message: Message) -> None:
        """Send a message."""
        if message["type"] == "http.response.start":
            self._has_begun = True
            self._is_stream = any(b"event-stream" in value for _, value in message["headers"])
        else:
            self._is_over = not message.get("more_body", False)
        await self._send(message)

    async def end(self, error: ApiError, scope: Mapping[str, Any], receive: Receive) -> None:
        """End a response by an error: as a response, or as the last event of a stream.

        Raises:
            LostError: part of another response is on its way; its connection closes.
        """
        if not self._has_begun:
            await error_response(error)(dict(scope), receive, self._send)
        elif self._is_stream and not self._is_over:
            await self._send({"type": "http.response.body", "body": event(error.body()).encode()})
        elif not self._is_over:
            raise LostError


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _budget_ms(body: bytes, headers: Mapping[str, str], default_ms: float | None) -> float | None:
    """Return a request's budget, as far as it can be read; what is wrong with it a replica tells."""
    try:
        asked = parse(body, Common)
        alias_ms = split_alias(asked.model or "")[1]
        return find_budget(asked.latency_budget_ms, headers, alias_ms, USUAL_TOKENS, default_ms).budget_ms
    except ApiError:
        return None


async def answered(app: Callable[..., Any], task: Task) -> AsyncIterator[Message]:
    """Yield the messages of an app's response to a task, and its time; who leaves early ends the response."""
    begin_ms, gone = now_ms(), asyncio.Event()
    messages, rest = asyncio.Queue[Message | None](), [task.body]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "root_path": "", **task.scope}
    scope["state"] = {WAITED: task.waited_ms}

    async def receive() -> Message:
        if rest:
            return {"type": "http.request", "body": rest.pop(), "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    running = asyncio.ensure_future(app(scope, receive, messages.put))
    running.add_done_callback(lambda _: messages.put_nowait(None))
    try:
        while (message := await messages.get()) is not None:
            yield message
        yield {INSIDE: now_ms() - begin_ms}
    finally:
        gone.set()
        await asyncio.wait((running,))
