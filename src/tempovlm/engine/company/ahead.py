"""Opens pictures before their requests' turns, while the device works for others.

A request that passes the door alone would open its picture inside, where the device has nothing to do meanwhile.
Decoders give Python's lock away, so that its caller's thread opens it beside those that are answered. The pixels
that wait are limited: a picture that finds no room is opened in its turn.
"""

from __future__ import annotations

import threading

import numpy as np

from tempovlm.core.request import Request
from tempovlm.core.units import now_ms
from tempovlm.engine.runner import Runner
from tempovlm.latency.clock import QUEUE, Lap, Reading

MOST_PIXELS = 16_000_000
"""Pixels that wait at a time, of 3 bytes each."""


class Room:
    """Counts pixels that wait, from any thread."""

    def __init__(self, most: int = MOST_PIXELS) -> None:
        self._lock, self._left = threading.Lock(), most

    def take(self, count: int) -> bool:
        """Take room for some pixels; return whether there was any."""
        with self._lock:
            fits = count <= self._left
            self._left -= count if fits else 0
            return fits

    def give(self, count: int) -> None:
        """Give room back."""
        with self._lock:
            self._left += count


class Opened:
    """A picture that was opened before its request's turn; it has room until it is closed.

    Attributes:
        image: (H, W, 3) its pixels; None without a picture. took_ms: opening it took so long.
    """

    def __init__(self, image: np.ndarray | None, took_ms: float, room: Room, taken: int) -> None:
        """Hold a picture of `taken` pixels of the room."""
        self.image, self.took_ms = image, took_ms
        self._room, self._taken = room, taken

    @classmethod
    def of(cls, run: Runner, request: Request, room: Room) -> Opened | None:
        """Open a request's picture; return None if there is no room for it.

        Raises:
            UserError: the picture cannot be read.
        """
        start_ms, taken = now_ms(), 0

        def may(count: int) -> bool:
            nonlocal taken
            taken = count if room.take(count) else 0
            return taken > 0

        try:
            image = run.open_if(request, may)
        except BaseException:
            room.give(taken)
            raise
        return None if image is None and request.images else cls(image, now_ms() - start_ms, room, taken)

    def close(self) -> np.ndarray | None:
        """Give the room back, once; return the pixels, which are no more held here."""
        image, taken = self.image, self._taken
        self.image, self._taken = None, 0
        self._room.give(taken)
        return image

    def placed(self, reading: Reading) -> Reading:
        """Return a reading with the time of the opening as preprocessing, not as a part of the waiting."""
        queue, *rest = reading.laps
        waited = Lap(QUEUE, max(0.0, queue.duration_ms - self.took_ms))
        return Reading((waited, Lap("preprocess", self.took_ms), *rest), reading.total_ms)
