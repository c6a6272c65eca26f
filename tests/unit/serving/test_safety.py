"""Guards against what strangers send: each input is harmless, of the kind that hurt a server of this sort.

The numbers are those of advisories about vLLM's API server; its code is not run here.
"""

from __future__ import annotations

import asyncio
import io
import json
import struct
import sys
import threading
import unicodedata
import zlib
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image, PngImagePlugin
from pydantic import BaseModel

from asgi import CHAT, NEEDS, ask, chat, encoded, get, post, question, url_of

pytest.importorskip("fastapi", reason=NEEDS)

from tempovlm.api import TempoVLM
from tempovlm.control.guard import Guard
from tempovlm.serving import app as app_module
from tempovlm.serving.errors import ApiError, scrubbed
from tempovlm.serving.gate import OPEN, Keys
from tempovlm.serving.intake import asks, pictures, remote
from tempovlm.serving.intake import body as body_module
from tempovlm.serving.intake.body import MOST_DEPTH, MOST_ITEMS, parse

HOSTS = ("images.example.com",)
PUBLIC = "93.184.216.34"


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.mark.parametrize("hosts", [(), HOSTS])
@pytest.mark.parametrize(
    "url",
    [
        "http://images.example.com/a.png",
        "file:///etc/hostname",
        "ftp://images.example.com/a.png",
        "https://localhost/a.png",
        "https://127.0.0.1/a.png",
        "https://images.example.com.evil.example/a.png",
        "https://images.example.com@evil.example/a.png",
        "https://evil.example\\@images.example.com/a.png",  # CVE-2026-24779: two readings of one address
        "https://images.example.com:8443/a.png",
        "https://images.example.com\r\nHost: evil/",
        "https://[::1]/a.png",
        "https://[bad/",
        "/etc/hostname",
        "",
    ],
)
def test_no_address_is_asked_but_those_that_are_allowed(
    app_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, url: str, hosts: tuple[str, ...]
) -> None:
    """CVE-2025-6242: pictures fetched from inside a network."""
    monkeypatch.setattr(remote, "addresses", lambda _: pytest.fail("a host was looked up"))
    reply = chat(app_of(allow_remote_images=hosts), image(url))
    assert (reply.status, reply.code) == (400, "invalid_image_url")
    assert reply.json["error"]["param"] == "messages.0.content.1.image_url"


@pytest.mark.parametrize(
    "found",
    [
        ["127.0.0.1"], ["10.1.2.3"], ["192.168.0.1"], ["169.254.169.254"], ["100.64.0.1"], ["0.0.0.0"],
        ["224.0.0.1"], ["::1"], ["fd00::1"], ["fe80::1%eth0"], ["::ffff:10.0.0.1"], ["2002:0a00:0001::1"],
        [PUBLIC, "10.0.0.1"], [],
    ],
    ids=str,
)  # fmt: skip
def test_a_host_must_be_public(found: list[str]) -> None:
    with pytest.raises(ApiError, match=r"not public|cannot be found"):
        remote.public_address("images.example.com", lambda _: found, "p")


class Connection:
    """A connection that answers as told, and remembers where it went."""

    made: list[tuple[Any, ...]]

    def __init__(self, reply: Any) -> None:
        self.made, self._reply = [], reply

    def __call__(self, *given: Any) -> Connection:
        self.made.append(given)
        return self

    def request(self, *given: Any, **_: Any) -> None:
        self.made.append(given)

    def getresponse(self) -> Any:
        if isinstance(self._reply, Exception):
            raise self._reply
        return self._reply

    def close(self) -> None:
        self.made.append(("closed",))


def answers(status: int, data: bytes) -> SimpleNamespace:
    return SimpleNamespace(status=status, read=io.BytesIO(data).read)


def fetch(monkeypatch: pytest.MonkeyPatch, reply: Any) -> tuple[Connection, Callable[[], bytes]]:
    connection = Connection(reply)
    monkeypatch.setattr(remote, "_Pinned", connection)
    url = "https://images.example.com/a.png?x=1"
    return connection, lambda: remote.fetch(url, HOSTS, 10, "p", lambda _: [PUBLIC])


def test_an_allowed_picture_is_fetched_from_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    connection, run = fetch(monkeypatch, answers(200, b"picture"))
    assert run() == b"picture"
    assert connection.made[0][:2] == ("images.example.com", PUBLIC)
    assert connection.made[1] == ("GET", "/a.png?x=1")
    assert connection.made[-1] == ("closed",)


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (answers(302, b""), "invalid_image_url"),
        (answers(200, b"x" * 11), "image_too_large"),
        (TimeoutError(), "invalid_image_url"),
        (HTTPException(), "invalid_image_url"),
    ],
    ids=["redirect", "large", "slow", "broken"],
)
def test_what_is_fetched_is_limited(monkeypatch: pytest.MonkeyPatch, reply: Any, code: str) -> None:
    connection, run = fetch(monkeypatch, reply)
    with pytest.raises(ApiError) as caught:
        run()
    assert caught.value.code == code
    assert connection.made[-1] == ("closed",)


def png(width: int, height: int) -> bytes:
    """The header of a PNG, and no pixel."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    size = struct.pack(">I", 13)
    return b"\x89PNG\r\n\x1a\n" + size + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"\0\0\0\0IDAT"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"no picture at all", "invalid_image"),
        (b"", "invalid_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "invalid_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "invalid_image"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "invalid_image"),
        (png(60_000, 60_000), "image_too_large"),
        (png(9_000, 9_000), "image_too_large"),
        (png(0, 5), "invalid_image"),
    ],
    ids=["text", "empty", "svg", "eps", "jpeg2000", "bomb", "large", "flat"],
)
def test_bad_pictures_are_refused_from_their_headers(app: Any, data: bytes, code: str) -> None:
    """CVE-2026-22778: an error's text held an address in memory; a decoder of JPEG 2000 was reached."""
    reply = chat(app, image(url_of(data)))
    assert (reply.status, reply.code) == (400, code)
    assert b"0x" not in reply.body
    assert b"object at" not in reply.body


@pytest.mark.parametrize(
    "url",
    ["data:text/html;base64,AAAA", "data:image/png,AAAA", "data:image/png;base64,A!A", "data:image/png;base64,é"],
)
def test_wrong_data_urls_are_refused(app: Any, url: str) -> None:
    assert chat(app, image(url)).code == "invalid_image_url"


def test_a_truncated_picture_is_an_error_of_its_request(app: Any, picture: Image.Image) -> None:
    reply = chat(app, image(url_of(encoded(picture)[:2000])))
    assert (reply.status, reply.code) == (400, "invalid_image")
    assert "damaged" in reply.json["error"]["message"]
    assert "image_url" in reply.json["error"]["param"]


def test_half_of_a_surrogate_pair_is_no_text(app: Any) -> None:
    for path, body in (
        (CHAT, {"messages": [{"role": "user", "content": "\ud800 what?"}]}),
        ("/v1/responses", {"input": "\udfff"}),
    ):
        reply = post(app, path, json.dumps(body).encode())
        assert (reply.status, reply.code) == (400, "invalid_value")


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_tiny_pictures_are_answered(app: Any, size: tuple[int, int]) -> None:
    """CVE-2026-22773: a picture of one pixel ended the server."""
    assert chat(app, image(url_of(encoded(Image.new("RGB", size))))).status == 200


def test_formats_that_are_read(app: Any, picture: Image.Image) -> None:
    for kind in ("JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        assert chat(app, image(url_of(encoded(picture, kind), "application/octet-stream"))).status == 200


def test_control_tokens_are_letters(
    app: Any, served: TempoVLM, part: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Places of a picture that a user types are text: they cannot be more than the picture has."""
    real, read, tokenizer = served.answer, [], served.engine.runner.tokenizer

    def answer(given: Any, text: str, **options: Any) -> Any:
        read.extend(tokenizer.encode(text))
        return real(given, text, **options)

    monkeypatch.setattr(served, "answer", answer)
    text = {"type": "text", "text": "<im_start>" + "<im_patch>" * 20 + "<|endoftext|>"}
    assert chat(app, part, text).status == 200
    assert read, "letters of the words that the tiny tokenizer has none for are left out"
    assert not set(read) & set(tokenizer.ids.values())


def test_fields_that_would_reach_into_the_server_are_ignored(app: Any) -> None:
    """CVE-2025-62164, CVE-2025-61620, CVE-2025-62426: embeddings and templates that came with a request."""
    more = {
        "prompt_embeds": "gASVAAAA", "chat_template": "{{ 1 }}", "chat_template_kwargs": {"tokenize": True},
        "mm_processor_kwargs": {"max_pixels": 1}, "guided_regex": "(((((", "tools": [{"type": "function"}],
    }  # fmt: skip
    said, plain = (chat(app, **given).json["choices"] for given in (more, {}))
    assert said == plain


def test_one_answer_a_request(app: Any) -> None:
    assert chat(app, n=1_000_000).json["error"]["param"] == "n"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]" * 3,
        b"\xff\xfe{",
        b'{"messages": NaN}',
        b'{"max_tokens": ' + b"9" * 5000 + b"}",
        b"[" * 5000,
        b'{"a": ' + b"[" * (MOST_DEPTH + 1) + b"]" * (MOST_DEPTH + 1) + b"}",
        b'{"a": [' + b"[]," * MOST_ITEMS + b"[]]}",
    ],
    ids=["empty", "open", "several", "utf16", "nan", "digits", "deep", "nested", "items"],
)
def test_json_is_limited(app: Any, body: bytes) -> None:
    reply = post(app, CHAT, body)
    assert (reply.status, reply.code) == (400, "invalid_json")


def test_depth_is_told_however_deep(app: Any) -> None:
    for depth in (MOST_DEPTH + 1, 1500, 5000):
        reply = post(app, CHAT, b'{"a": ' + b"[" * depth + b"]" * depth + b"}")
        assert "deeper than" in reply.json["error"]["message"]
    text = json.dumps("[" * 5000 + '"{' * 100)
    body = json.dumps(question()).replace('"what does the sign say?"', text).encode()
    assert post(app, CHAT, body).status == 200, "brackets in a text are no depth"


def test_what_a_text_holds_is_no_item_and_ends_no_string(app: Any) -> None:
    for text in ("a," * MOST_ITEMS, '\\"[' * 50, "\\\\", "\\"):
        said = json.dumps(question()).replace('"what does the sign say?"', json.dumps(f"what, {text}?"))
        reply = post(app, CHAT, said.encode())
        assert reply.status == 200 or reply.code == "context_length_exceeded"
    escaped = json.dumps(question()).replace("/", "\\/").encode()
    assert post(app, CHAT, escaped).status == 200
    for body in (b'{"a": "[', b'{"a": "\\', b'{"a": "\\"', b'"\\\\"]'):
        assert post(app, CHAT, body).code == "invalid_json"


@pytest.mark.parametrize("num_bytes", [2, 3, 4, 5])
def test_a_string_ends_where_it_does_however_it_is_read(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    monkeypatch.setattr(body_module, "_PIECE_BYTES", num_bytes)

    class Pair(BaseModel):
        a: str
        b: list[str]

    for text in ('"', "\\", '\\"', 'a"[' * 40, '\\\\"a' * 7, "é\n[" * 33, "[" * 40 + "\\"):
        value = {"a": text, "b": [text] * 3}
        assert parse(json.dumps(value).encode(), Pair).model_dump() == value
        with pytest.raises(ApiError, match="deeper"):
            parse(json.dumps(value).encode()[:-1] + b', "c": ' + b"[" * MOST_DEPTH, Pair)
        with pytest.raises(ApiError, match="not valid JSON"):
            parse(b'{"a": "' + b"[" * 40 + json.dumps(text).encode()[1:-1], Pair)


def test_a_byte_of_a_question_has_no_more_tokens_than_are_left_for_it() -> None:
    letters = (chr(code) for code in range(0xA0, sys.maxunicode + 1) if not 0xD800 <= code < 0xE000)
    most = max(len(unicodedata.normalize("NFKD", one).encode()) / len(one.encode()) for one in letters)
    assert most <= asks._TOKENS_OF_BYTE


def test_what_can_take_long_to_parse_is_parsed_beside_the_loop(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parsers = []

    def noted(*given: Any) -> Any:
        parsers.append(threading.current_thread())
        return parse(*given)

    monkeypatch.setattr(app_module, "parse", noted)
    for num_letters in (1, 1 << 18):
        assert chat(app, user="a" * num_letters).status == 200
    assert [one is threading.current_thread() for one in parsers] == [True, False]


def test_a_picture_that_holds_much_text_is_refused(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", PngImagePlugin.MAX_TEXT_MEMORY)
    monkeypatch.setattr(pictures, "MOST_TEXT_BYTES", 1000)
    pictures.limit_text()
    for num_letters, status in ((500, 200), (2000, 400)):
        file, notes = io.BytesIO(), PngImagePlugin.PngInfo()
        notes.add_text("note", "a" * num_letters, zip=True)
        Image.new("RGB", (30, 20)).save(file, "PNG", pnginfo=notes)
        assert chat(app, image(url_of(file.getvalue()))).status == status


def test_tables_for_other_lengths_are_made_beside_the_loop(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    makers, make = [], Guard._with_tables

    def noted(guard: Guard) -> Guard:
        makers.append(threading.current_thread())
        return make(guard)

    monkeypatch.setattr(Guard, "_with_tables", noted)
    for latency_budget_ms in (None, 1e5, 1.0):
        new = {"style": "pointing", "max_tokens": 27, "latency_budget_ms": latency_budget_ms}
        assert chat(app, **new).status == (429 if latency_budget_ms == 1 else 200)
        assert len(makers) == (1 if latency_budget_ms is None else 2), "once for each guard"
    assert threading.current_thread() not in makers


@pytest.mark.parametrize("body", [b"[]", b"5", b"null", b'"text"'])
def test_other_json_is_no_request(app: Any, body: bytes) -> None:
    assert post(app, CHAT, body).code == "invalid_value"


def test_a_large_body_is_not_read_to_its_end(app_of: Callable[..., Any]) -> None:
    app, piece = app_of(max_body_mb=0.001), b" " * 600
    told = asyncio.run(ask(app, CHAT, [piece], {"content-length": "2000"}))
    found = asyncio.run(ask(app, CHAT, [piece] * 3))
    for reply in (told, found):
        assert (reply.status, reply.code, reply.headers["connection"]) == (413, "request_too_large", "close")


def test_slow_senders_are_closed(app_of: Callable[..., Any]) -> None:
    reply = asyncio.run(ask(app_of(body_timeout_ms=20.0), CHAT, [b"{"], stall=True))
    assert (reply.status, reply.code, reply.headers["connection"]) == (408, "request_timeout", "close")


def test_keys(app_of: Callable[..., Any]) -> None:
    """CVE-2025-59425: keys were compared letter by letter. CVE-2026-22778: a body was read before the key."""
    app, body = app_of(api_keys=("right", "other")), json.dumps(question()).encode()
    for value in ("", "Bearer", "Bearer wrong", "right", "Basic right", "Bearer righ", "Bearer é"):
        headers = {"authorization": value} if value else {}
        reply = asyncio.run(ask(app, CHAT, [body], {**headers, "content-length": "x"}))
        assert (reply.status, reply.code) == (401, "invalid_api_key")
    for key in ("right", "other"):
        assert post(app, CHAT, question(), {"authorization": f"Bearer {key}"}).status == 200
    for path in ("/v1/models", "/v1", "//v1/models", "/V1/models", "/nothing", "/calibrate", "/docs"):
        assert get(app, path).status == 401
    for path in OPEN:
        assert get(app, path).status == 200


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    keys, compared, real = Keys(("a", "b", "c")), [], hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda *two: compared.append(two) or real(*two))
    assert keys.owner({"authorization": "Bearer a"}) == "0"
    assert len(compared) == 3


def test_messages_hold_no_paths_and_addresses() -> None:
    text = (
        "cannot read /srv/models/tiny.png <io object at 0x7f12ab34cd56>\nC:\\Users\\me\\a.png; use image/png, 1/2"
    )
    assert scrubbed(text) == "cannot read … <io object at …> …; use image/png, 1/2"


def test_nothing_is_unpickled_or_run() -> None:
    import tempovlm.serving

    (folder,) = map(Path, tempovlm.serving.__path__)
    words = ("pickle", "eval(", "exec(", "torch.load", "subprocess", "jinja2", "yaml")
    found = [(path.name, word) for path in folder.rglob("*.py") for word in words if word in path.read_text()]
    assert not found
