"""Steps recorded once and replayed: starting the kernels of a step one by one may take longer than they do.

What a step works on is copied to tensors that stay where they are, one set for all recordings of equal shapes;
what it finds are gradients, which have a place of their own, and figures. All recordings share one pool of
memory, since nothing in it outlives a replay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tempovlm.engine.cuda.capture import without_collection
from tempovlm.training.step import Gradients, Result, Work

EAGER = 3
"""Steps of a kind that run before it is recorded: kernels are compiled in the first, and kinds that hardly come
again are not worth it."""

MOST = 96
"""Recordings; the kinds of steps that come later are never recorded."""

MOST_FIGURES = 16


@dataclass(frozen=True, slots=True)
class Recording:
    """One kind of step.

    Attributes:
        replay: runs it again. values: what it works on. names: of its figures. used: weights with a gradient.
    """

    replay: Callable[[], object]
    values: dict[str, Tensor]
    names: tuple[str, ...]
    used: tuple[int, ...]


def record_on_cuda(function: Callable[[], None], pool: Any) -> Callable[[], object]:
    """Record a function of the current device; other threads may use the device meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with without_collection(), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        function()
    return graph.replay


class Graphs:
    """Runs steps, and records the kinds that come again."""

    def __init__(
        self,
        compute: Callable[[Work], Result],
        gradients: Gradients,
        record: Callable[[Callable[[], None], Any], Callable[[], object]] = record_on_cuda,
        pool: Any = None,
    ) -> None:
        """Start without recordings.

        Args:
            compute: the loss of a step's work.
            gradients: take its gradients.
            record: returns what replays a function.
            pool: memory of all recordings.
        """
        self.compute, self.gradients, self.record, self.pool = compute, gradients, record, pool
        self.recordings: dict[Hashable, Recording] = {}
        self.seen: Counter[Hashable] = Counter()
        self.room: dict[Hashable, Tensor] = {}
        self.figures = torch.zeros(MOST_FIGURES, device=gradients.room[0].device)

    def run(self, work: Work) -> tuple[tuple[str, ...], Tensor]:
        """Take the gradients of a step's work; return its figures, which hold until the next step."""
        shapes = tuple((name, one.shape, one.dtype) for name, one in work.values.items())
        key = (work.course, shapes)
        self.seen[key] += 1
        if key not in self.recordings:
            if self.seen[key] <= EAGER or len(self.recordings) >= MOST:
                names, used = self._take(work)
                self.gradients.show(used)
                return names, self.figures[: len(names)]
            self.recordings[key] = self._record(work)
        found = self.recordings[key]
        for name, one in work.values.items():
            found.values[name].copy_(one)
        found.replay()
        self.gradients.show(found.used)
        return found.names, self.figures[: len(found.names)]

    def _record(self, work: Work) -> Recording:
        values = {
            name: self.room.setdefault((name, one.shape, one.dtype), torch.empty_like(one))
            for name, one in work.values.items()
        }
        found: list[tuple[tuple[str, ...], tuple[int, ...]]] = []
        for name, one in work.values.items():
            values[name].copy_(one)
        replay = self.record(lambda: found.append(self._take(Work(work.course, values))), self.pool)
        names, used = found[0]
        return Recording(replay, values, names, used)

    def _take(self, work: Work) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Compute and write gradients and figures to their places."""
        result = self.compute(work)
        used = self.gradients.take(result.loss)
        self.figures[: len(result.names)].copy_(result.figures)
        return result.names, used
