"""The vision stages on CUDA as captured graphs, one for each number of crops, over buffers that never move.

The stages stay separate, so that each has its own time. A request copies its crops into a stage's buffers and
copies the result out, so that another request between two stages does not disturb it. A number of crops that was
never captured is padded to the next larger one that was, or runs kernel by kernel, and is captured later, while
nobody waits. The input buffers are shared, so that one stage of one request runs at a time.

Shapes: `U` distinct crops, `C` crops, `P` patches of a crop, `X` values of a patch, `F` features of a patch, `G`
tokens of a crop, `D` decoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tempovlm.control.learned.observation import pooled
from tempovlm.engine.cuda.capture import Recorder
from tempovlm.model.family import VisionLanguageModel
from tempovlm.model.vision.tiling import CROPS_OF_TIER

MAX_CROPS = 1 + max(most for _, most in CROPS_OF_TIER.values())
"""Crops of the largest grid with the global one: more run without a graph."""


class Replayable(Protocol):
    """A captured graph."""

    def replay(self) -> None:
        """Start the captured work."""


class Records(Protocol):
    """Captures graphs: `Recorder`."""

    def graph(self, run: Callable[[], object]) -> Replayable:
        """Return a graph of the work that `run` starts."""


def crop_counts(tier: str) -> tuple[frozenset[int], frozenset[int]]:
    """Return the numbers of distinct crops and of crops in the grids of a tier.

    The only tile of a 1 × 1 grid equals the global crop; in all other grids every crop is distinct.
    """
    least, most = CROPS_OF_TIER[tier]
    crops = frozenset(1 + tiles for tiles in range(least, most + 1))
    return frozenset(1 if count == 2 else count for count in crops), crops


class Stage:
    """One function of crops, captured by their number.

    Attributes:
        wanted: numbers that ran without a graph since the last capture, though one could have served.
    """

    def __init__(
        self,
        run: Callable[..., Tensor],
        inputs: tuple[Tensor, ...],
        recorder: Records | None,
        *,
        joins: bool = False,
    ) -> None:
        """Take the function, its buffers, and who captures.

        The result of one that joins belongs to all crops together, which no padding may change; its caller copies
        it. Others have a result for each crop.
        """
        self._run, self._inputs, self._recorder, self._joins = run, inputs, recorder, joins
        self._graphs: dict[int, tuple[Replayable, list[Tensor]]] = {}
        self.wanted: set[int] = set()

    def __call__(self, *values: Tensor) -> Tensor:
        """Call the function on device values whose first dimension is the crops; the caller owns the result."""
        return self.together(*((value,) for value in values))

    @torch.inference_mode()
    def together(self, *values: Sequence[Tensor]) -> Tensor:
        """Call the function on the crops of several pictures; each value has a part for each picture."""
        count = sum(map(len, values[0]))
        if count not in self._graphs and self._recorder is not None and count <= len(self._inputs[0]):
            self.wanted.add(count)
        captured = self._graphs.get(self._room(count))
        if captured is None:
            every = (torch.cat(list(parts)) if len(parts) > 1 else parts[0] for parts in values)
            return self._run(*(one.to(own.dtype) for one, own in zip(every, self._inputs, strict=True)))
        graph, made = captured
        for own, parts in zip(self._inputs, values, strict=True):
            if len(parts) > 1:
                torch.cat(list(parts), out=own[:count])
            else:
                own[:count].copy_(parts[0])
        with torch.cuda.device_of(self._inputs[0]):
            graph.replay()
        return made[-1] if self._joins else made[-1][:count].clone()

    def _room(self, count: int) -> int:
        """The least captured number that a number of crops can be padded to, if there is one."""
        return count if self._joins else min((one for one in self._graphs if one >= count), default=count)

    def capture(self, count: int) -> None:
        """Capture the function for this number of crops."""
        self.wanted.discard(count)
        if self._recorder is None or count in self._graphs or count > len(self._inputs[0]):
            return
        made: list[Tensor] = []  # the last one belongs to the graph
        graph = self._recorder.graph(lambda: made.append(self._of(count)))
        self._graphs[count] = graph, made

    @torch.inference_mode()
    def _of(self, count: int) -> Tensor:
        """The captured work."""
        return self._run(*(own[:count] for own in self._inputs))


class VisionGraphs:
    """Both stages of one model, which must not move afterwards, because graphs hold its addresses."""

    def __init__(self, model: VisionLanguageModel, recorder: Records | None) -> None:
        config, like = model.config, model.decoder.embedding
        vision = config.vision

        def buffer(*shape: int, dtype: torch.dtype = like.dtype) -> Tensor:
            return torch.zeros(MAX_CROPS, *shape, dtype=dtype, device=like.device)

        patches = buffer(vision.num_patches, vision.patch_values)
        features = buffer(vision.num_patches, vision.feature_width)
        masks = buffer(vision.num_patches, dtype=torch.float32)
        self.encode = Stage(model.vision, (patches,), recorder)
        """Return features (U, P, F) of crops (U, P, X) in the model's type."""
        self.project = Stage(model.projector, (features, masks), recorder)
        """Features (C, P, F) and masks (C, P) to tokens (C, G, D)."""
        tokens = buffer(vision.pooled**2, config.width)
        self.pool = Stage(pooled, (tokens,), recorder, joins=True)
        """Tokens (C, G, D) to (2 * D,) float32, which a policy sees of the picture."""

    def settle(self, is_quiet: Callable[[], bool]) -> None:
        """Capture the numbers of crops that have no graph of their own, one after the other, while it is quiet."""
        for stage in (self.encode, self.project, self.pool):
            for count in sorted(stage.wanted):
                if is_quiet():
                    stage.capture(count)

    def warmup(self, tiers: Collection[str], advance: Callable[[int, int], None] | None = None) -> int:
        """Capture the graphs that pictures of some tiers can need; return their number."""
        jobs: list[tuple[Stage, int]] = []
        distinct, crops = (frozenset[int]().union(*sets) for sets in zip(*map(crop_counts, tiers), strict=True))
        for stage, counts in ((self.encode, distinct), (self.project, crops), (self.pool, crops)):
            jobs += [(stage, count) for count in sorted(counts, reverse=True)]
        for done, (stage, count) in enumerate(jobs, 1):
            stage.capture(count)
            if advance is not None:
                advance(done, len(jobs))
        return len(jobs)


def vision_graphs(model: VisionLanguageModel, recorder: Recorder | None = None) -> VisionGraphs | None:
    """Graphs for a model on CUDA, captured by `recorder`, by default one of its own; None on a CPU."""
    recorder = recorder or Recorder.on(model.decoder.embedding.device)
    return None if recorder is None else VisionGraphs(model, recorder)
