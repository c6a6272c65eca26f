"""The threads that each stage of an answer has: by measurement, and fewer beside busy processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from tempovlm.engine.cpu.neighbours import FreeCores
from tempovlm.engine.forks import FORKS

STAGES = ("vision_encoder", "projector", "prefill")
"""Those that several threads may run, as timings name them."""

Counts: TypeAlias = Mapping[str, tuple[tuple[int, int], ...]]
"""Of a stage: pairs of a size of its work (crops, or tokens of a prompt) and the threads from that size on."""


class Crew:
    """Says how many threads a stage may start.

    Attributes:
        usual: threads of a stage that was not measured.
        most: threads that a measurement may find.
        counts: as measured.
        sizes: of the last work of each stage.
        held_back: set when a stage got fewer threads than it was to have.
    """

    def __init__(self, usual: int, most: int, counts: Counts) -> None:
        self.usual, self.most, self.counts = usual, max(usual, most), counts
        self.sizes: dict[str, int] = {}
        self.held_back = False
        self._cores = FreeCores()

    @property
    def most_free(self) -> int:
        """The most threads that have a core each where no other process runs."""
        return min(FORKS.threads(self.most), self._cores.count)

    def use(self, counts: Counts) -> None:
        """Have these numbers of threads from now on, and have been held back by nobody."""
        self.counts, self.held_back = counts, False

    def threads(self, stage: str, size: int) -> int:
        """Return the threads for a stage's next work of this size: no more than there are free cores."""
        wanted = FORKS.threads(self._measured(stage, size))
        threads = min(wanted, self._cores.look())
        self.sizes[stage], self.held_back = size, self.held_back or threads < wanted
        return threads

    def _measured(self, stage: str, size: int) -> int:
        """The threads of the largest measured work that is no larger; of the smallest where all were larger."""
        pairs = self.counts.get(stage, ())
        smaller = [threads for measured, threads in pairs if measured <= size]
        return smaller[-1] if smaller else pairs[0][1] if pairs else self.usual
