"""The stages of an answer, each a function of the previous stage's result.

Every stage enters inference mode by itself, so that streams which are stepped alternately leave no mode behind.
Shapes: `C` crops, `P` patches, `G` tokens of a crop, `T` tokens, `D` width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count

import numpy as np
import torch
from torch import Tensor

from tempovlm.control.policy import Sight
from tempovlm.core.decode_dtype import DecodeDtype
from tempovlm.core.plan import Plan
from tempovlm.core.request import Request
from tempovlm.engine.cpu.stages import CpuStages
from tempovlm.engine.cuda.graphs import GraphDecoder, Lane, Made
from tempovlm.engine.cuda.vision_graphs import VisionGraphs
from tempovlm.engine.feature_cache import FeatureCache
from tempovlm.engine.open_answers import Limits, OpenAnswers
from tempovlm.engine.sampling import Sampler
from tempovlm.engine.watch import Tick
from tempovlm.model.cache import KVCache
from tempovlm.model.family import VisionLanguageModel
from tempovlm.model.narrow import NARROW, NarrowDecoder
from tempovlm.model.prompt import Prompt, Tokenizer, build_prompt
from tempovlm.model.vision.device_crops import cut_on_device
from tempovlm.model.vision.encoder import only_live
from tempovlm.model.vision.image import open_if, open_image
from tempovlm.model.vision.tiling import Crops, choose_grid, cut_crops

FEW_CROPS = 2
"""Up to this many crops the vision side of a narrow model is faster on one thread, as its decoder always is."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A picture and a question, ready for the model; no crops without a picture."""

    crops: Crops | None
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class Decoding:
    """A prompt that was read: logits (1, V) of its first token, and the state for the next ones."""

    logits: Tensor
    plan: Plan
    cache: KVCache
    length: int
    lane: Lane | None = None


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs the stages of requests on one model; keeps no state of requests.

    Attributes:
        exact: resize pictures in float32, as published, instead of uint8, which is several times faster on a CPU.
            On CUDA pictures are always resized in float32, and this only adds the published padding rule.
        narrow: decodes for a narrow model on a CPU; None for all others.
        stages: run a CPU's stages by kernels; without them the plain modules do, and `narrow`.
        graphs: decodes on CUDA; without it the plain model decodes.
        vision: encodes and projects on CUDA. features: cache of picture features; None turns it off.
        open_answers: limits for questions that list no options; None sets no limits.
    """

    model: VisionLanguageModel
    tokenizer: Tokenizer
    exact: bool = False
    narrow: NarrowDecoder | None = None
    graphs: GraphDecoder | None = None
    vision: VisionGraphs | None = None
    features: FeatureCache | None = None
    open_answers: OpenAnswers | None = None
    stages: CpuStages | None = None

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.decoder.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Type that it computes in."""
        return self.model.decoder.embedding.dtype

    @property
    def backend(self) -> str | None:
        """Name of the back end on a CPU, `torch` or `kernels (TYPE-INSTRUCTIONS)`; None elsewhere."""
        if self.device.type != "cpu":
            return None
        return "torch" if self.stages is None else f"kernels ({self.stages.name})"

    @property
    def decode_dtype(self) -> DecodeDtype:
        """Weights that decode steps read; `bf16` stands for the weights as loaded."""
        return "bf16" if self.graphs is None else self.graphs.decode_dtype

    def open(self, request: Request) -> np.ndarray | None:
        """Return the picture's pixels (H, W, 3), None without a picture."""
        return open_image(request.images[0]) if request.images else None

    def open_if(self, request: Request, may: Callable[[int], bool]) -> np.ndarray | None:
        """Like `open`, if `may`, asked with the number of pixels before any is decoded, says True; else None."""
        return open_if(request.images[0], may) if request.images else None

    @torch.inference_mode()
    def prepare(self, image: np.ndarray | None, tier: str, request: Request) -> Prepared:
        """Cut the tier's crops, on CUDA if the model is there, and build the token stream."""
        config = self.model.config
        with self._threads():
            crops = None if image is None else self._cut(image, tier)
        grid = crops.grid if crops else None
        prompt = build_prompt(
            request.question, request.style, grid, config, self.tokenizer, request.max_new_tokens
        )
        return Prepared(crops, prompt)

    def num_crops(self, image: np.ndarray | None, tier: str) -> int:
        """Return the number of crops that a tier cuts of pixels (H, W, 3); 0 without a picture."""
        if image is None:
            return 0
        height, width, _ = image.shape
        return choose_grid(tier, height, width, self.model.config.vision).num_crops

    def _cut(self, image: np.ndarray, tier: str) -> Crops:
        vision = self.model.config.vision
        if self.device.type == "cuda":
            return cut_on_device(image, tier, vision, self.device, exact=self.exact)
        return cut_crops(image, tier, vision, exact=self.exact)

    @torch.inference_mode()
    def encode(self, crops: Crops | None, tick: Tick | None = None) -> Tensor | None:
        """Distinct crops through the vision transformer: (U, P, features); `tick` is called between its blocks."""
        if crops is None:
            return None
        with self._threads(small=len(crops.patches) <= FEW_CROPS):
            patches = crops.patches.to(self.device, self.dtype, non_blocking=True)
            live = None if crops.live is None else crops.live.to(self.device, non_blocking=True)
            run = partial(self.see_crops, tick=tick) if self.vision is None else self.vision.encode
            every = run(patches) if self.features is None else self.features.features(patches, run)
            return only_live(every, live)

    def see_crops(self, patches: Tensor, live: Tensor | None = None, tick: Tick | None = None) -> Tensor:
        """Return the features (U, P, features) of patches (U, P, values), zeros for those False in `live` (U,)."""
        if self.stages is None:
            return self.model.vision(patches, live, tick)
        return only_live(self.stages.encode(patches, tick), live)

    @torch.inference_mode()
    def project(self, patches: Tensor | None, crops: Crops | None) -> Tensor | None:
        """Pool and project every crop: (C, G, D)."""
        if patches is None or crops is None:
            return None
        with self._threads(small=len(patches) <= FEW_CROPS):
            masks = crops.masks.to(self.device, non_blocking=True)  # does not wait for the vision transformer
            index = None if len(crops.index) == len(patches) else crops.index.to(self.device, non_blocking=True)
            every = patches if index is None else patches.index_select(0, index)
            if self.vision is not None:
                return self.vision.project(every, masks)
            run = self.model.projector if self.stages is None else self.stages.project
            return run(every, masks)

    def see(self, ready: Prepared, tier: str, vision: Tensor | None, *, pool: bool) -> Sight:
        """Return the encoded picture at a tier for a policy, from its projected tokens `vision` (C, G, D).

        With `pool`, the pooled tokens are copied to the host: on CUDA the copy is queued and complete once the
        device has been waited for.
        """
        feature = None
        if pool and vision is not None and self.vision is not None:
            feature = self.vision.pool(vision)
            feature = torch.empty(feature.shape, pin_memory=feature.is_cuda).copy_(feature, non_blocking=True)
        return Sight(tier, vision, ready.prompt.num_vision_tokens, ready.prompt.num_text_tokens, feature)

    def settle(self, is_quiet: Callable[[], bool] = lambda: True) -> None:
        """Capture, while it is quiet, the work that ran without a graph."""
        for graphs in (self.vision, self.graphs):
            if graphs is not None:
                graphs.settle(is_quiet)

    def measured(self) -> AbstractContextManager[None]:
        """Run every stage in full while the block runs, for a cached picture too."""
        return nullcontext() if self.features is None else self.features.bypassed()

    @contextmanager
    def _threads(self, *, small: bool = True) -> Iterator[None]:
        """Use one thread for small work of a small model on a CPU, and afterwards as many as before."""
        before = torch.get_num_threads()
        narrow = small and before > 1 and self.device.type == "cpu" and self.model.config.width < NARROW
        try:
            if narrow:
                torch.set_num_threads(1)
            yield
        finally:
            if narrow:
                torch.set_num_threads(before)

    def small_work(self) -> AbstractContextManager[None]:
        """Context for small work outside the stages, such as a policy's: single-threaded if that is faster."""
        return self._threads()

    def lane(self) -> AbstractContextManager[Lane | None]:
        """Context of the state that one request decodes on; yields None if it needs no own state."""
        return nullcontext() if self.graphs is None else self.graphs.lane()

    @torch.inference_mode()
    def prefill(
        self,
        prompt: Prompt,
        features: Tensor | None,
        plan: Plan,
        max_new_tokens: int,
        lane: Lane | None = None,
        tick: Tick | None = None,
    ) -> Decoding:
        """Read the prompt; the cache, the lane's if there is one, has room for all later tokens."""
        tokens = prompt.tokens.to(self.device, non_blocking=True)  # else the copy waits for the vision side
        capacity = len(tokens) + max_new_tokens
        with self._threads():
            x = self.model.embed(tokens.unsqueeze(0), features, prompt.slots)
            if lane is not None:
                return Decoding(lane.prompts.read(x, plan), plan, lane.cache_for(plan), len(tokens), lane)
            cache = KVCache.allocate(self.model.config, len(plan.steps), 1, capacity, x)
            return Decoding(self.read(x, plan, cache, tick=tick), plan, cache, len(tokens))

    def read(
        self, x: Tensor, plan: Plan, cache: KVCache, lengths: Tensor | None = None, tick: Tick | None = None
    ) -> Tensor:
        """Return logits (B, V) after embeddings (B, T, D); `lengths` and `tick` as in the model's `prefill`."""
        run = self.model.prefill if self.stages is None else self.stages.prefill
        return run(x, plan, cache, lengths, tick)

    @torch.inference_mode()
    def decode(self, token: Tensor, state: Decoding, count: int) -> Tensor:
        """Return logits (1, V) after the `count`-th generated token (1,)."""
        start = state.length + count - 1
        if self.stages is not None:
            return self.stages.decode(int(token), state.plan, state.cache, start)
        if self.narrow is not None:
            with np.errstate(all="ignore"):  # the transcript reports logits that are not numbers
                return self.narrow.decode(int(token), state.plan, state.cache, start)
        with self._threads():
            return self.model.decode(token, state.plan, state.cache, start)

    def steps(self, first: Tensor, state: Decoding, sample: Sampler, request: Request) -> Iterator[Made]:
        """Return the tokens after the `first` (1,), one step each, on request."""
        limits = self.limits([request])
        if self.graphs is not None and state.lane is not None:
            return self.graphs.steps(state.lane, first, state.plan, state.length, request, limits.second(first))
        return self._plain_steps(first, state, sample, limits)

    def _plain_steps(self, token: Tensor, state: Decoding, sample: Sampler, limits: Limits) -> Iterator[Made]:
        for number in count(1):
            token = sample(limits(self.decode(token, state, number), token, number))
            yield Made(int(token))

    def limits(self, requests: Sequence[Request]) -> Limits:
        """Return the limits of the answers to these requests, a row each."""
        return Limits(self.open_answers, requests)
