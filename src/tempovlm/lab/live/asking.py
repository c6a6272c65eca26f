"""Asks a server about pictures: one after the other, in a closed loop, or at given times, whoever is answered."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tempovlm.core.progress import Advance, silent
from tempovlm.core.units import now_ms, s_from_ms
from tempovlm.data.sample import Sample
from tempovlm.lab.live.client import Client, Reply

PATH = "/v1/chat/completions"

BUDGET_HEADER = "x-tempovlm-budget-ms"
"""Header of a request's budget in milliseconds, for bodies that are sent with several budgets."""


def body_of(sample: Sample, budget_ms: float | None, **fields: Any) -> bytes:
    """Return the body of a request about a sample.

    Args:
        sample: its picture, question and style are sent.
        budget_ms: of the request; None sends none.
        fields: further ones of the body.
    """
    kind = "png" if sample.image_path.suffix == ".png" else "jpeg"
    picture = base64.b64encode(sample.image_path.read_bytes()).decode()
    content = [
        {"type": "text", "text": sample.question},
        {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{picture}"}},
    ]
    asked = {"messages": [{"role": "user", "content": content}], "style": sample.style, **fields}
    return json.dumps(asked | ({} if budget_ms is None else {"latency_budget_ms": budget_ms})).encode()


async def one_by_one(client: Client, bodies: Sequence[bytes]) -> list[Reply]:
    """Ask one after the other on one connection."""
    return [await client.post(PATH, body) for body in bodies]


async def closed_loop(client: Client, bodies: Sequence[bytes], callers: int, seconds: float) -> float:
    """Return the answers a second that some callers get who ask again at once."""
    count, end_ms, begin_ms = 0, now_ms() + 1e3 * seconds, now_ms()

    async def call(first: int) -> None:
        nonlocal count
        number = first
        while now_ms() < end_ms:
            reply = await client.post(PATH, bodies[number % len(bodies)])
            count += reply.status == 200
            number += callers

    await asyncio.gather(*(call(i) for i in range(callers)))
    return 1e3 * count / (now_ms() - begin_ms)


@dataclass(frozen=True, slots=True)
class Call:
    """One request of an open loop.

    Attributes:
        sent_ms: when it was sent, from the loop's begin. reply: None where the connection failed.
    """

    sent_ms: float
    reply: Reply | None


async def open_loop(
    ask: Callable[[int], Awaitable[Reply]], arrivals_ms: Sequence[float], advance: Advance = silent
) -> list[Call]:
    """Ask at given times, in their order, whoever has been answered.

    Args:
        ask: sends the request of a number, from 0, and returns the reply.
        arrivals_ms: when each is sent, from the loop's begin.
        advance: told of what is done.
    """
    begin_ms, done, count = now_ms(), 0, len(arrivals_ms)

    async def call(number: int) -> Call:
        nonlocal done
        sent_ms = now_ms() - begin_ms
        try:
            reply = await ask(number)
        except OSError:
            reply = None
        done += 1
        advance(done, count)
        return Call(sent_ms, reply)

    calls: list[asyncio.Task[Call]] = []
    for number, due_ms in enumerate(arrivals_ms):
        await asyncio.sleep(s_from_ms(max(0.0, due_ms - (now_ms() - begin_ms))))
        calls.append(asyncio.create_task(call(number)))
    return await asyncio.gather(*calls)
