"""The page: its files and their headers, the figures it draws, and itself in a browser."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny_model
from asgi import NEEDS, ask, chat, get, post

pytest.importorskip("fastapi", reason=NEEDS)

from test_server import Running

import browser
from browser import Browser
from tempovlm.api import TempoVLM, load
from tempovlm.engine import calibration
from tempovlm.lab.drawing import FONT, STAGE_COLORS, THEME
from tempovlm.serving.page import FOLDER
from tempovlm.serving.recent import MOST_ANSWERS, NUM_SLOTS, SLOT_MS, Recent

FILES = sorted(path for path in FOLDER.rglob("*") if path.is_file())
MOST_BYTES = 120_000


def test_the_page_is_small_and_needs_no_other_host() -> None:
    assert sum(path.stat().st_size for path in FILES) < MOST_BYTES
    assert "MIT License" in (FOLDER / "uplot" / "LICENSE").read_text()
    for path in FILES:
        if path.suffix in (".html", ".css", ".js"):
            text = path.read_text(encoding="utf-8")
            addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.[a-z]{2,}[\w./-]*", text))
            assert addresses <= {"https://github.com/leeoniya/uPlot"}, "its author's, in a comment"


def test_its_colours_are_those_of_the_reports() -> None:
    css = (FOLDER / "page.css").read_text(encoding="utf-8")
    for i, block in enumerate(re.findall(r":root\{(.*?)\}", css, re.DOTALL)):
        said = dict(re.findall(r"--(\w+):\s*([^;]+)", block))
        assert {name: said[name] for name in THEME} == {name: pair[i] for name, pair in THEME.items()}
        if i == 0:
            assert {name: said[name] for name in STAGE_COLORS} == STAGE_COLORS
            assert said["font"].replace("\n", "") == FONT


def test_every_file_is_served_with_its_type_and_its_limits(app: Any) -> None:
    kinds = {
        ".html": "text/html",
        ".css": "text/css",
        ".js": "text/javascript",
        ".svg": "image/svg+xml",
        ".webp": "image/webp",
        "": "text/plain",
    }
    for path in FILES:
        reply = get(app, f"/static/{path.relative_to(FOLDER).as_posix()}")
        assert (reply.status, reply.body) == (200, path.read_bytes())
        assert reply.headers["content-type"].partition(";")[0] == kinds[path.suffix]
        assert reply.headers["x-content-type-options"] == "nosniff"
    page = get(app, "/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"].split("; ")
    assert policy[0] == "default-src 'none'"
    assert {rule.partition(" ")[2] for rule in policy} == {"'none'", "'self'"}


def test_a_browser_asks_whether_its_copy_is_the_same(app: Any) -> None:
    first = get(app, "/")
    assert first.headers["cache-control"] == "no-cache"
    same = get(app, "/", **{"if-none-match": first.headers["etag"]})
    assert (same.status, same.body) == (304, b"")


def test_the_page_is_for_get_and_has_its_own_files_alone(app: Any) -> None:
    for method in ("POST", "PUT", "DELETE"):
        assert asyncio.run(ask(app, "/", method=method)).status == 405
    assert post(app, "/static/page.js", {}).status == 405
    for path in ("/static/", "/static/nothing.js", "/static/../page.py", "/static//etc/passwd"):
        reply = get(app, path)
        assert (reply.status, reply.code) == (404, "not_found")


def test_the_figures_of_the_page(app_of: Callable[..., Any], part: dict[str, Any]) -> None:
    app = app_of()
    chat(app, part, latency_budget_ms=60_000, price_per_ms=0)
    chat(app)
    chat(app, latency_budget_ms=1)
    chat(app, latency_budget_ms=-1)
    found = get(app, "/live").json
    assert {end: sum(counts) for end, counts in found["requests"].items()} == {
        "met": 1, "no_budget": 1, "missed": 0, "cut": 0, "refused": 1,
    }  # fmt: skip
    assert sum(found["settings"].values()) == 2
    assert found["answers"]["budget_ms"] == [60_000]
    assert found["answers"]["total_ms"][0] > 0
    assert 0 < found["feasible_ms"][0] < found["feasible_ms"][1]
    assert (found["model"], found["is_ready"], found["running"], found["num_waiting"]) == ("tiny", True, 0, 0)


def test_the_figures_need_the_key_and_the_page_does_not(app_of: Callable[..., Any]) -> None:
    app = app_of(api_keys=("secret",))
    assert get(app, "/").status == get(app, "/static/page.js").status == 200
    assert get(app, "/live").status == 401
    assert get(app, "/live", authorization="Bearer secret").status == 200


def answer(budget_ms: float | None = 100.0) -> Any:
    """An answer, as far as its figures are drawn."""
    return SimpleNamespace(knobs="low/k4/b8", timings_ms={"total": 80.0}, budget_ms=budget_ms)


def test_recent_minutes() -> None:
    recent, now_ms = Recent(), 1e6
    recent.answered(answer(), "met", 0.0, now_ms)
    recent.waits(3, now_ms + 1)
    recent.waits(1, now_ms + 2)
    recent.answered(answer(None), None, 0.25, now_ms + 2 * SLOT_MS)
    recent.refused("queue_full", now_ms + 2 * SLOT_MS)
    recent.refused("invalid_value", now_ms + 2 * SLOT_MS)
    told = recent.told(now_ms + 3 * SLOT_MS)
    assert {end: counts[-4:] for end, counts in told["requests"].items()} == {
        "met": [1, 0, 0, 0], "no_budget": [0, 0, 1, 0], "missed": [0] * 4, "cut": [0] * 4, "refused": [0, 0, 1, 0],
    }  # fmt: skip
    assert told["waiting"][-4:] == [3, 0, 0, 0]
    assert told["price_per_ms"][-4:] == [0, None, pytest.approx(0.25), None]
    assert (told["settings"], told["answers"]["deadline"]) == ({"low/k4/b8": 2}, ("met",))
    later = recent.told(now_ms + (NUM_SLOTS + 1) * SLOT_MS)
    assert (later["settings"], later["answers"]["deadline"]) == ({"low/k4/b8": 1}, ())


def test_what_is_kept_is_bounded() -> None:
    recent = Recent()
    for i in range(2 * MOST_ANSWERS):
        recent.answered(answer(), "met", 0.0, 10 * i * SLOT_MS / MOST_ANSWERS)
    told = recent.told(20 * SLOT_MS)
    assert sum(told["requests"]["met"]) == 2 * MOST_ANSWERS
    assert len(told["answers"]["budget_ms"]) == MOST_ANSWERS


# In a browser.


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = browser.find_browser()
    if program is None:
        pytest.skip(browser.NEEDS)
    found = Browser(program, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def slow(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TempoVLM:
    """The tiny model with times of 20 times those made up elsewhere, so that no stall here changes a choice."""
    nominal_ms = tiny_model.nominal_ms
    monkeypatch.setattr(tiny_model, "nominal_ms", lambda *given: 20 * nominal_ms(*given))
    monkeypatch.setenv("TEMPOVLM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(calibration, "measure", lambda *_, **__: tiny_model.make_profile().measurements)
    model = load(str(tiny_folder), device="cpu", warmup=False, progress=False)
    model.calibrate()
    return model


@contextmanager
def serving(app: Any, patch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yields the address of a server on a socket."""
    running = Running(app, patch)
    host, port = running.address[:2]
    try:
        yield f"http://{host}:{port}/"
    finally:
        running.signal()
        running.thread.join()


FIRST = "document.querySelector('.row')"
LOADED = "document.getElementById('question').value && document.getElementById('about').textContent"


def test_in_a_browser_another_budget_gets_another_setting(
    page: Browser, slow: TempoVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tempovlm.serving.app import create_app

    with serving(create_app(slow), monkeypatch) as address:
        page.open(address)
        page.until(LOADED)
        assert page.run("document.getElementById('picture').ariaLabel") == "large print: signs"
        page.run("document.getElementById('budget').focus()")
        page.press("End", "Tab", "Enter")
        rich = page.until(f"{FIRST}.querySelector('.knobs').textContent")
        assert rich == "{} tier · {} experts · {} blocks".format(*slow.space.native.values)
        assert "on time" in page.run(f"{FIRST}.textContent")
        assert page.run(f"{FIRST}.querySelectorAll('.part').length") >= 5
        assert page.run("document.getElementById('status').textContent").endswith(rich)

        page.run("document.getElementById('budget').focus()")
        page.press("Home")
        assert "no setting fits" in page.until(f"{FIRST}.querySelector('.bad').textContent")

        page.press(*["ArrowRight"] * 40)
        other = page.until(f"{FIRST}.querySelector('.knobs').textContent")
        assert other != rich
        ends = page.run("[...document.querySelectorAll('.row .mark')].map(mark => parseFloat(mark.style.left))")
        assert ends[0] < ends[-1] <= 100, "the bars have one scale"
        assert page.until("/^[2-9] answers, [1-9] refused/.test(document.getElementById('live-line').textContent)")
        assert page.run("document.querySelectorAll('.plot canvas').length") == 3
        assert page.run("document.querySelectorAll('#settings li').length") == 2
        assert [problem for problem in page.problems if "429" not in problem] == []


def test_in_a_browser_it_is_narrow_and_dark(page: Browser, app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(app, monkeypatch) as address:
        page.show_as(1100)
        page.open(address)
        page.until(LOADED)
        ink = "getComputedStyle(document.body).color"
        light = page.run(ink)
        page.show_as(320, dark=True)
        assert page.until(
            "document.documentElement.scrollWidth <= 320 && !!document.querySelector('.plot canvas')"
        )
        assert page.run(ink) != light
        page.show_as(1100)


def test_in_a_browser_the_key_is_asked_for_and_not_kept(
    page: Browser, app_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(app_of(api_keys=("secret",)), monkeypatch) as address:
        page.open(address)
        page.until("!document.getElementById('key-form').hidden")
        page.run("document.getElementById('key').focus()")
        for key in ("wrong", "secret"):
            page.call("Input.insertText", text=key)
            page.press("Enter")
            page.until(f"!document.getElementById('key-note').textContent == {str(key == 'secret').lower()}")
        page.until("document.getElementById('key-form').hidden && document.getElementById('about').textContent")
        assert page.run("document.cookie + JSON.stringify([localStorage, sessionStorage])") == "[{},{}]"
        assert page.run("document.getElementById('key').value") == ""
        page.open(address)
        page.until("!document.getElementById('key-form').hidden")
