"""A client of an ASGI app in this process, which can leave, or send its body in pieces."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

NEEDS = "the server needs its extra: pip install 'tempovlm[serve]' (make test installs it)"


@dataclass
class Reply:
    """A response."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The error's code."""
        return self.json["error"]["code"]

    @property
    def events(self) -> list[Any]:
        """The objects of a stream, without its end mark."""
        lines = [
            line.removeprefix("data: ") for line in self.body.decode().split("\n") if line.startswith("data: ")
        ]
        return [json.loads(line) for line in lines if line != "[DONE]"]


async def ask(
    app: Any,
    path: str,
    pieces: Sequence[bytes] = (b"",),
    headers: dict[str, str] | None = None,
    method: str = "POST",
    leave: asyncio.Event | None = None,
    leave_at: bytes | None = None,
    stall: bool = False,
) -> Reply:
    """Return the response; the client goes away when `leave` is set or when it reads `leave_at`.

    With `stall` it never ends its body.
    """
    given = {"content-type": "application/json", **(headers or {})}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(name.lower().encode(), value.encode()) for name, value in given.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    left, reply, rest = leave or asyncio.Event(), Reply(), list(pieces)

    async def receive() -> dict[str, Any]:
        if rest:
            piece = rest.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(rest) or stall}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            reply.status = message["status"]
            reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            reply.body += message.get("body", b"")
            if leave_at is not None and leave_at in reply.body:
                left.set()

    await app(scope, receive, send)
    return reply


def get(app: Any, path: str, **headers: str) -> Reply:
    return asyncio.run(ask(app, path, headers=headers, method="GET"))


def post(app: Any, path: str, body: Any, headers: dict[str, str] | None = None) -> Reply:
    """Post an object as JSON, or bytes as they are."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return asyncio.run(ask(app, path, [data], headers))


CHAT = "/v1/chat/completions"


def question(*parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The body of a chat completion."""
    content = [{"type": "text", "text": "what does the sign say?"}, *parts]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 3, **more}


def chat(app: Any, *parts: dict[str, Any], headers: dict[str, str] | None = None, **more: Any) -> Reply:
    return post(app, CHAT, question(*parts, **more), headers)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    """The bytes of a picture's file."""
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def url_of(data: bytes, kind: str = "image/png") -> str:
    """A data URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
