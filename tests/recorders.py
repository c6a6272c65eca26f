"""Recorders of graphs that work on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Again:
    """A recorder whose graphs run the captured function once more."""

    captured: int = 0
    replayed: int = 0
    runs: list[Callable[[], object]] = field(default_factory=list)

    def graph(self, run: Callable[[], object]) -> _Graph:
        self.captured += 1
        return _Graph(self, run)


@dataclass
class _Graph:
    of: Again
    run: Callable[[], object]

    def replay(self) -> None:
        self.of.replayed += 1
        self.run()
