"""A real browser without a window, driven by the DevTools protocol over a pipe, which needs no library."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import signal
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NEEDS = f"the page's test needs a browser: one of {', '.join(PROGRAMS)} (Debian: apt-get install chromium)"
SOON_S = 15.0
"""Seconds that nothing here takes unless it hangs."""

_FLAGS = (
    "--headless=new",
    "--hide-scrollbars",
    "--no-sandbox",  # which root and containers lack
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--remote-debugging-pipe",
)
_FIRST_FREE = 10
"""Descriptors from here on stay clear of 3 and 4, which the browser reads and writes."""


def find_browser() -> str | None:
    """Return the path of a browser, or None."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


def _moved_up(descriptor: int) -> int:
    found = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE)
    os.close(descriptor)
    return found


class Browser:
    """One page in a browser of its own, with an empty profile.

    Attributes:
        problems: errors that the page had, and files that it could not load.
    """

    def __init__(self, program: str, profile: Path) -> None:
        (theirs, self._write), (self._read, said) = (map(_moved_up, pair) for pair in (os.pipe(), os.pipe()))
        actions = [
            (os.POSIX_SPAWN_DUP2, theirs, 3),
            (os.POSIX_SPAWN_DUP2, said, 4),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
        ]
        words = [program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = os.posix_spawn(program, words, os.environ, file_actions=actions, setpgroup=0)
        os.close(theirs)
        os.close(said)
        self._rest, self._count, self._is_loaded = b"", 0, False
        self.problems: list[str] = []
        self._session: dict[str, str] = {}
        target = next(one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        """End the browser and its processes."""
        os.killpg(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        os.close(self._read)
        os.close(self._write)

    def call(self, method: str, **given: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result; notes errors of the page on the way."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": given, **self._session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (reply := self._next()).get("id") != self._count:
            self._note(reply)
        assert "error" not in reply, (method, reply["error"])
        return reply["result"]

    def _note(self, event: dict[str, Any]) -> None:
        match event["method"], event["params"]:
            case "Page.loadEventFired", _:
                self._is_loaded = True
            case "Runtime.exceptionThrown", {"exceptionDetails": details}:
                self.problems.append(details["exception"]["description"])
            case "Log.entryAdded", {"entry": {"level": "error"} as entry}:
                self.problems.append(f"{entry['text']} {entry.get('url', '')}")

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._read], [], [], SOON_S)[0], "the browser hangs"
            data = os.read(self._read, 1 << 16)
            assert data, "the browser has ended"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, address: str) -> None:
        """Load a page, and forget the problems of the one before."""
        self._is_loaded, self.problems = False, []
        self.call("Page.navigate", url=address)
        while not self._is_loaded:
            self._note(self._next())

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page; waits for a promise."""
        reply = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in reply, (script, reply["exceptionDetails"])
        return reply["result"].get("value")

    def until(self, condition: str) -> Any:
        """Wait until an expression in the page is true, and return its value."""
        looking = f"""new Promise((done, failed) => {{
            const look = () => {{
                const found = (() => {{ try {{ return {condition} }} catch {{ return null }} }})();
                if (found) done(found); else setTimeout(look, 20);
            }};
            look();
            setTimeout(() => failed(new Error("never: " + document.body.innerText)), {1000 * SOON_S * 0.6});
        }})"""
        return self.run(looking)

    def press(self, *keys: str) -> None:
        """Press keys, by the names of the protocol, such as Tab and ArrowLeft."""
        for key in keys:
            code = {"text": "\r"} if key == "Enter" else {}
            virtual = {"Tab": 9, "Enter": 13, "ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35}[key]
            named = {"key": key, "code": key, "windowsVirtualKeyCode": virtual}
            self.call("Input.dispatchKeyEvent", type="keyDown", **named, **code)
            self.call("Input.dispatchKeyEvent", type="keyUp", **named)

    def show_as(self, width: int, *, dark: bool = False, height: int = 900) -> None:
        """Lay the page out `width` CSS pixels wide, in light or dark colours."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
