"""A glance before the first choice: the global crop, cut, encoded and projected, for policies that need to see it.

Every tier needs the global crop, so an answer reuses its features from the vision transformer, and cuts and
encodes
only the tiles. The glance's projection is the policy's own work and belongs to the control stage: the mask of the
global crop depends on the tiling, which is chosen later, so the answer projects all of its crops again.
Shapes: `U` distinct crops, `P` patches of a crop, `G` tokens of a crop, `D` decoder
width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch
from torch import Tensor

from tempovlm.control.guard import Guard
from tempovlm.control.policy import Policy
from tempovlm.core.knobs import TIERS, KnobSpace
from tempovlm.core.request import Request
from tempovlm.engine.runner import Prepared, Runner
from tempovlm.engine.watch import Tick
from tempovlm.latency.clock import StageClock, stage_clock
from tempovlm.latency.profile import LatencyProfile
from tempovlm.model.prompt import build_prompt
from tempovlm.model.vision.tiling import Crops, choose_grid, cut_crops, cut_tiles

PICTURE_SIZE = (480, 640)
"""Height and width of the blank picture on which glances are measured."""

SPLIT_REPEATS = 5
SPLIT_LIMIT_MS = 1000.0
"""Number of comparisons of encoding in one and in two passes, and the time after which they end."""


@dataclass(frozen=True, slots=True)
class Glance:
    """A picture of which the global crop is encoded.

    Attributes:
        image: (H, W, 3) its pixels.
        ready: the picture and the question as prepared for the lowest tier.
        features: (1, P, features) of the global crop.
        elapsed_ms: time since acceptance when they were ready.
        tokens: (1, G, D) their projection at the lowest tier.
    """

    image: np.ndarray
    ready: Prepared
    features: Tensor
    elapsed_ms: float
    tokens: Tensor

    @torch.inference_mode()
    def prepare(self, run: Runner, tier: str, request: Request) -> Prepared:
        """Like `Runner.prepare`, but above the lowest tier the crops' patches are those of the tiles only."""
        config, whole = run.model.config, self.ready.crops
        assert whole is not None
        height, width, _ = self.image.shape
        if choose_grid(tier, height, width, config.vision) == whole.grid:
            return self.ready
        if run.device.type != "cpu":
            # The runner may cut on the device, where one more crop costs almost nothing.
            ready = run.prepare(self.image, tier, request)
            assert ready.crops is not None
            return Prepared(without_global(ready.crops), ready.prompt)
        with run.small_work():
            crops = cut_tiles(self.image, tier, config.vision, exact=run.exact)
        prompt = build_prompt(
            request.question, request.style, crops.grid, config, run.tokenizer, request.max_new_tokens
        )
        return Prepared(crops, prompt)

    @torch.inference_mode()
    def encode(self, run: Runner, crops: Crops | None, tick: Tick | None = None) -> Tensor:
        """Features (U, P, features) of what `prepare` returned: the tiles are encoded, if there are any."""
        tiles = None if crops is self.ready.crops else run.encode(crops, tick)
        return self.features if tiles is None else torch.cat((self.features, tiles))


def take_glance(run: Runner, image: np.ndarray, tier: str, request: Request, clock: StageClock) -> Glance:
    """Cut and encode the global crop as the lowest `tier` has it; marks all stages but the projection."""
    ready = run.prepare(image, tier, request)
    clock.mark("preprocess")
    features = run.encode(ready.crops)
    clock.mark("vision_encoder")
    elapsed_ms = clock.elapsed_ms()
    assert features is not None
    assert ready.crops is not None
    return Glance(image, ready, features, elapsed_ms, project_glance(run, features, ready.crops))


def without_global(crops: Crops) -> Crops:
    """Return the same crops with the patches of the tiles only, as `cut_tiles` makes them."""
    live = None if crops.live is None else crops.live[1:]
    return replace(crops, patches=crops.patches[1:], live=live)


def project_glance(run: Runner, features: Tensor, crops: Crops) -> Tensor:
    """Return tokens (1, G, D) of the global crop alone, from its features and the lowest tier's crops."""
    first = Crops(crops.patches[:1], crops.index[:1], crops.masks[:1], crops.grid)
    tokens = run.project(features, first)
    assert tokens is not None
    return tokens


def guarded(run: Runner, space: KnobSpace, policy: Policy, profile: LatencyProfile | None) -> Guard:
    """Guard a policy over the whole knob space; measures its time, including glances if it needs them."""
    if not policy.sees_glance:
        return Guard.around(policy, space, profile)
    tiers = tuple(dict.fromkeys((TIERS[0], *space.tiers)))  # every glance is as the lowest tier has it
    glance, split_ms = blank_glance(run, TIERS[0]), measure_split_ms(run, tiers)
    with run.small_work():
        return Guard.around(policy, space, profile, glance, split_ms)


def blank_glance(run: Runner, tier: str) -> Callable[[], Tensor]:
    """Return a function that projects the glance of a blank picture, to be timed; `tier` is the lowest."""
    crops = _blank_crops(run, tier)
    features = run.encode(crops)
    assert features is not None
    return lambda: project_glance(run, features, crops)


def measure_split_ms(run: Runner, tiers: Sequence[str]) -> dict[str, float]:
    """Measure the extra time of encoding in two passes, by tier: the global crop first, then the tiles.

    At most the time of the first pass. 0 at the lowest tier, the first of `tiers`, which has no second pass.
    """
    split_ms = dict.fromkeys(tiers[:1], 0.0)
    for tier in tiers[1:]:
        blank, spent_ms = _blank_crops(run, tier), 0.0
        rows: list[tuple[float, ...]] = []
        while len(rows) < SPLIT_REPEATS and spent_ms < SPLIT_LIMIT_MS:
            # Use other pixels each time, so that no cache of pictures hits.
            patches = blank.patches + 0.01 * len(rows)
            rows.append(tuple(_encode_ms(run, blank, part) for part in (patches, patches[:1], patches[1:])))
            spent_ms += sum(rows[-1])
        together_ms, first_ms, rest_ms = (median(column) for column in zip(*rows, strict=True))
        split_ms[tier] = min(max(first_ms + rest_ms - together_ms, 0.0), first_ms)
    return split_ms


def _encode_ms(run: Runner, crops: Crops, patches: Tensor) -> float:
    some = replace(crops, patches=patches, live=None)
    clock = stage_clock(run.device)
    run.encode(some)
    return clock.elapsed_ms()


def _blank_crops(run: Runner, tier: str) -> Crops:
    return cut_crops(np.zeros((*PICTURE_SIZE, 3), np.uint8), tier, run.model.config.vision, exact=run.exact)
