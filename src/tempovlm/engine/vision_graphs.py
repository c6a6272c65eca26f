"""The vision stages on CUDA as captured graphs, one for each number of crops, over buffers that never move.

Encoding, projecting and pooling for a policy stay apart, so that each has a time of its own. A request copies its
crops into a stage's buffers and takes a copy of the result out: whatever another request does between two stages,
nothing of it is seen. A number of crops that was never captured runs kernel by kernel at once and is captured
behind, between requests. The input buffers are shared, so that one stage of one request runs at a time.

Shapes: `U` distinct crops, `C` crops, `P` patches of a crop, `X` values of a patch, `F` features of a patch, `G`
tokens of a crop, `D` decoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

import torch
from torch import Tensor

from tempovlm.control.observation import pooled
from tempovlm.engine.capture import Recorder
from tempovlm.model.family import VisionLanguageModel
from tempovlm.model.vision.tiling import CROPS_OF_TIER

MAX_CROPS = 1 + max(most for _, most in CROPS_OF_TIER.values())
"""Crops of the largest grid with the global one: more run without a graph."""


class Replayable(Protocol):
    """A captured graph."""

    def replay(self) -> None:
        """Start what was captured."""


class Records(Protocol):
    """What takes captures: `Recorder`."""

    def graph(self, run: Callable[[], object]) -> Replayable:
        """A graph of what `run` starts."""


def crop_counts(tier: str) -> tuple[frozenset[int], frozenset[int]]:
    """The numbers of distinct crops and of crops that the grids of a tier have.

    The one tile of a 1 × 1 grid equals the global crop; in all other grids every crop is distinct.
    """
    least, most = CROPS_OF_TIER[tier]
    crops = frozenset(1 + tiles for tiles in range(least, most + 1))
    return frozenset(1 if count == 2 else count for count in crops), crops


class Stage:
    """One function of crops, captured by their number.

    Attributes:
        wanted: the numbers that ran without a graph since the last capture, where one could have served.
    """

    def __init__(
        self,
        run: Callable[..., Tensor],
        inputs: tuple[Tensor, ...],
        recorder: Records | None,
        *,
        lends: bool = False,
    ) -> None:
        """Take the function, its buffers, and who captures; one that lends leaves the copying to the caller."""
        self._run, self._inputs, self._recorder, self._lends = run, inputs, recorder, lends
        self._graphs: dict[int, tuple[Replayable, list[Tensor]]] = {}
        self.wanted: set[int] = set()

    @torch.inference_mode()
    def __call__(self, *values: Tensor) -> Tensor:
        """The function of values on the device whose first dimension is the crops.

        The caller owns the result; what is lent holds until the next call.
        """
        count = len(values[0])
        captured = self._graphs.get(count)
        if captured is None:
            if self._recorder is not None and count <= len(self._inputs[0]):
                self.wanted.add(count)
            return self._run(*values)
        graph, made = captured
        for own, value in zip(self._inputs, values, strict=True):
            own[:count].copy_(value)
        with torch.cuda.device_of(values[0]):
            graph.replay()
        return made[-1] if self._lends else made[-1].clone()

    def capture(self, count: int) -> None:
        """Capture the function of so many crops."""
        self.wanted.discard(count)
        if self._recorder is None or count in self._graphs or count > len(self._inputs[0]):
            return
        made: list[Tensor] = []  # the last one is the graph's own
        graph = self._recorder.graph(lambda: made.append(self._of(count)))
        self._graphs[count] = graph, made

    @torch.inference_mode()
    def _of(self, count: int) -> Tensor:
        """What a graph holds."""
        return self._run(*(own[:count] for own in self._inputs))


class VisionGraphs:
    """The stages of one model, which must not move afterwards: graphs hold its addresses."""

    def __init__(self, model: VisionLanguageModel, recorder: Records | None) -> None:
        config, like = model.config, model.decoder.embedding
        vision = config.vision

        def buffer(*shape: int, dtype: torch.dtype = like.dtype) -> Tensor:
            return torch.zeros(MAX_CROPS, *shape, dtype=dtype, device=like.device)

        patches = buffer(vision.num_patches, vision.patch_values)
        features = buffer(vision.num_patches, vision.feature_width)
        masks = buffer(vision.num_patches, dtype=torch.float32)
        self.encode = Stage(model.vision, (patches,), recorder)
        """(U, P, X) of the model's type to features (U, P, F)."""
        self.project = Stage(model.projector, (features, masks), recorder)
        """Features (C, P, F) and masks (C, P) to tokens (C, G, D)."""
        tokens = buffer(vision.pooled**2, config.width)
        self.pool = Stage(pooled, (tokens,), recorder, lends=True)
        """Tokens (C, G, D) to (2 * D,) float32, which a policy sees of the picture."""

    def settle(self) -> None:
        """Capture the numbers of crops that ran without a graph."""
        for stage in (self.encode, self.project, self.pool):
            for count in sorted(stage.wanted):
                stage.capture(count)

    def warmup(self, tiers: Collection[str], advance: Callable[[int, int], None] | None = None) -> int:
        """Capture what pictures of some tiers can need; how many graphs that are."""
        jobs: list[tuple[Stage, int]] = []
        distinct, crops = (frozenset[int]().union(*sets) for sets in zip(*map(crop_counts, tiers), strict=True))
        for stage, counts in ((self.encode, distinct), (self.project, crops), (self.pool, crops)):
            jobs += [(stage, count) for count in sorted(counts, reverse=True)]
        for done, (stage, count) in enumerate(jobs, 1):
            stage.capture(count)
            if advance is not None:
                advance(done, len(jobs))
        return len(jobs)


def vision_graphs(model: VisionLanguageModel) -> VisionGraphs | None:
    """Graphs for a model on CUDA; None on a CPU."""
    recorder = Recorder.on(model.decoder.embedding.device)
    return None if recorder is None else VisionGraphs(model, recorder)
