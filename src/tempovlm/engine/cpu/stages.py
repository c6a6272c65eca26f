"""Runs a model's stages on a CPU by the kernels of `kernels.c`: vision transformer, projector, prompts, tokens.

States between blocks, and the keys and values that a prompt leaves, are float32 whatever the factors of products
are. A forked child may compute too: the kernels start threads of its own.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast, get_args

import torch
from torch import Tensor

from tempovlm.core.checks import wrong_argument
from tempovlm.core.decode_dtype import Backend
from tempovlm.core.plan import Plan
from tempovlm.engine.cpu.crew import Counts, Crew
from tempovlm.engine.cpu.library import Precision, best_precision, fault, instructions, is_compiled, library
from tempovlm.engine.cpu.packing import (
    LANES,
    MOST_EXPERTS,
    MOST_POOLED,
    Packer,
    pack_decoder,
    pack_projector,
    pack_vision,
)
from tempovlm.engine.watch import Tick
from tempovlm.model.cache import KVCache
from tempovlm.model.decoder import is_plain
from tempovlm.model.family import VisionLanguageModel
from tempovlm.model.vlm import Molmo

_log = logging.getLogger("tempovlm")

_Ticker = ctypes.CFUNCTYPE(ctypes.c_int)
_NO_TICKER = _Ticker()


def check_backend(backend: Backend) -> Backend:
    """Return a back end that exists and can run here.

    Raises:
        UserError: of `backend`.
    """
    if backend not in get_args(Backend):
        raise wrong_argument("backend", backend, f"unknown; choose from {', '.join(get_args(Backend))}")
    if backend == "kernels" and (why := fault()):
        raise wrong_argument("backend", backend, why)
    return backend


def pick_precision(backend: Backend, dtype: torch.dtype | None, model: VisionLanguageModel) -> Precision | None:
    """Return the type of the kernels' factors; None where the torch modules run.

    Args:
        backend: `auto` takes the kernels where they can run this model.
        dtype: that the caller asked for. Default: bfloat16 where processor and compiler have instructions for it.
        model: as loaded.

    Raises:
        UserError: `kernels` cannot run this model.
    """
    check_backend(backend)
    if backend == "torch":
        return None
    why = fault() or _unfit(model) or ""
    tried: tuple[Precision, ...] = ("float32",)
    if _wanted(dtype) == "bfloat16":
        tried = ("bfloat16", "float32")  # old compilers know no bfloat16
    for precision in () if why else tried:
        try:
            library(precision)
        except OSError as error:
            why = f"could not be compiled: {' '.join(str(error).split())}"
            continue
        if why:
            _log.warning("the kernels run in float32, slower than in bfloat16, which %s", why)
        return precision
    if backend == "kernels":
        raise wrong_argument("backend", backend, why)
    if instructions() is not None and _unfit(model) is None:
        _log.warning("torch runs the model, four times slower than the kernels: backend kernels %s", why)
    return None


def to_compile(backend: Backend, dtype: torch.dtype | None, model: VisionLanguageModel) -> bool:
    """Whether the kernels may have to be compiled before they run a model, which takes seconds."""
    return backend != "torch" and (fault() or _unfit(model)) is None and not is_compiled(_wanted(dtype))


def _wanted(dtype: torch.dtype | None) -> Precision:
    return best_precision() if dtype is None else "float32"


def _unfit(model: VisionLanguageModel) -> str | None:
    """Return why the kernels would compute something else than a model; None if they compute it."""
    weight = model.decoder.embedding
    if type(model) is not Molmo or not is_plain(model.decoder) or weight.device.type != "cpu":
        return "runs Molmo's models on a CPU; leave it out for this one"
    if weight.dtype != torch.float32:
        return "needs weights in float32; leave out dtype"
    config = model.config
    widths = (config.width, config.head_width, config.vision.width, config.vision.width // config.vision.num_heads)
    if any(width % LANES for width in (*widths, config.vision.patch_values, config.vision.mlp_width)):
        return f"needs widths that are multiples of {LANES}; leave it out for this model"
    if config.num_experts > MOST_EXPERTS:
        return f"has at most {MOST_EXPERTS} experts; leave it out for this model"
    if config.vision.pool**2 > MOST_POOLED:
        return f"pools at most {MOST_POOLED} patches into a token; leave it out for this model"
    if len(set(config.vision.feature_blocks)) < len(config.vision.feature_blocks):
        return "keeps each layer of the pictures once; leave it out for this model"
    return None


class CpuStages:
    """The stages of one model, with weights packed for the kernels.

    Attributes:
        precision: type of the factors of products.
        crew: the threads of each stage; a token has one.
    """

    def __init__(
        self,
        model: Molmo,
        precision: Precision,
        threads: int,
        most_threads: int = 1,
        counts: Counts | None = None,
    ) -> None:
        """Pack a model's weights.

        Args:
            model: in float32, on a CPU.
            precision: type of the factors of products.
            threads: of a stage that was not measured.
            most_threads: that a measurement may find.
            counts: that it found.
        """
        self._model, self.precision, self.crew = model, precision, Crew(threads, most_threads, counts or {})
        self._kernels = library(precision)
        packer = Packer(self._kernels.panel_columns(), self._kernels.panel_pair())
        self._vision = pack_vision(model.vision, packer)
        self._projector = pack_projector(model.projector, packer)
        self._decoder = pack_decoder(model.decoder, packer)
        self._embedding = model.decoder.embedding.detach()

    def __reduce__(self) -> tuple[Callable[..., CpuStages], tuple[Any, ...]]:
        """Copies and other processes pack the weights again."""
        return CpuStages, (self._model, self.precision, self.crew.usual, self.crew.most, self.crew.counts)

    @property
    def name(self) -> str:
        """Type of the factors and the instructions, as a stamp has them."""
        return f"{self.precision}-{instructions()}"

    def encode(self, patches: Tensor, tick: Tick | None = None) -> Tensor:
        """Return the features (C, P, F) of patches (C, P, patch values).

        `tick` is called before each block, and may raise.
        """
        patches = _fit("patches", patches, (len(patches), self._vision.tokens - 1, self._vision.patch_values))
        C, P, _ = patches.shape
        threads = self.crew.threads("vision_encoder", C)
        features = torch.empty(C, P, self._vision.num_kept * self._vision.width)
        self._run(self._kernels.encode, tick, self._vision, patches, C, features, threads)
        return features

    def project(self, features: Tensor, masks: Tensor) -> Tensor:
        """Return the tokens (C, G, D) of features (C, P, F) and shares of real pixels (C, P)."""
        threads = self.crew.threads("projector", len(features))
        sizes = (len(features), self._vision.tokens - 1)
        features = _fit("features", features, (*sizes, self._projector.features))
        masks = _fit("masks", masks.float(), sizes)
        tokens = torch.empty(len(features), self._projector.side**2, self._projector.out_width)
        values = (features, masks, len(features), tokens, threads)
        _checked(self._kernels.project(*map(_passed, (self._projector, *values))))
        return tokens

    def prefill(
        self,
        x: Tensor,
        plan: Plan,
        cache: KVCache,
        lengths: Tensor | None = None,
        tick: Tick | None = None,
    ) -> Tensor:
        """Return logits (B, V) after the last real tokens of embeddings (B, T, D), as the model's `prefill`.

        Keys and values go to the cache's first places. `tick` is called before each block, and may raise.
        """
        x = _fit("x", x, (*x.shape[:2], self._decoder.width))
        B, T, _ = x.shape
        self._check(plan, cache, B, T)
        ends = torch.full((B,), T) if lengths is None else lengths.to(torch.int64).contiguous()
        if ends.shape != (B,) or not 1 <= int(ends.min()) <= int(ends.max()) <= T:
            raise IndexError(f"lengths {ends.tolist()}, of {B} from 1 to {T}")
        logits, threads = self._room(B), self.crew.threads("prefill", B * T)
        states = x.clone()
        values = (states, B, T, ends, cache.keys, cache.values, cache.capacity, logits, threads)
        self._run(self._kernels.read_prompts, tick, self._decoder, *_steps(plan), *values)
        return logits[:, : self._model.decoder.head.out_features]

    def decode(self, token: int, plan: Plan, cache: KVCache, start: int) -> Tensor:
        """Return logits (1, V) after one more token, which is written to a cache of one row at `start`."""
        self._check(plan, cache, 1, start + 1)
        x, logits = self._embedding[token].clone(), self._room(1)
        values = (x, cache.keys, cache.values, cache.capacity, start, logits)
        _checked(self._kernels.decode(*map(_passed, (self._decoder, *_steps(plan), *values))))
        return logits[:, : self._model.decoder.head.out_features]

    def _check(self, plan: Plan, cache: KVCache, rows: int, tokens: int) -> None:
        """Refuse what the kernels would read or write beyond: they check nothing."""
        config, most = self._model.config, min(cache.capacity, len(self._model.decoder.rotary.cos))
        if not 1 <= tokens <= most:
            raise IndexError(f"{tokens} tokens, of 1 to {most}")
        blocks, experts = config.num_blocks, config.num_experts
        for block, top_k in plan.steps:
            if not (0 <= block < blocks and 1 <= top_k <= experts):
                raise IndexError(f"step {(block, top_k)}: the model has {blocks} blocks of {experts} experts")
        shape = (len(plan.steps), rows, config.kv_heads, cache.capacity, config.head_width)
        for name, kept in (("keys", cache.keys), ("values", cache.values)):
            if _fit(name, kept, shape) is not kept:
                raise ValueError(f"{name} are not contiguous")

    def _room(self, rows: int) -> Tensor:
        return torch.empty(rows, self._decoder.head.rows)

    @staticmethod
    def _run(function: Any, tick: Tick | None, *values: Any) -> None:
        """Call a kernel that a tick may end, and raise what the tick raised."""
        raised: list[BaseException] = []

        def call() -> int:
            try:
                cast(Tick, tick)()
            except BaseException as error:  # noqa: BLE001 - raised again below
                raised.append(error)
            return len(raised)

        ended = function(*map(_passed, values), _NO_TICKER if tick is None else _Ticker(call))
        if raised:
            raise raised.pop()  # else it holds this frame, and its tensors, until garbage is collected
        _checked(ended)


def _fit(name: str, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return contiguous values for the kernels, which go by the shape and read float32."""
    if values.shape != shape or values.dtype != torch.float32 or not values.is_cpu:
        found = f"{tuple(values.shape)} in {values.dtype} on {values.device}"
        raise ValueError(f"{name} {found}, not {shape} in torch.float32 on cpu")
    return values.contiguous()


@lru_cache(maxsize=256)
def _steps(plan: Plan) -> tuple[Any, Any, int]:
    kind = ctypes.c_int32 * len(plan.steps)
    return kind(*(block for block, _ in plan.steps)), kind(*(top_k for _, top_k in plan.steps)), len(plan.steps)


def _passed(value: Any) -> Any:
    """Return an argument as C takes it."""
    if isinstance(value, Tensor):
        assert value.is_contiguous()
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_long(value) if isinstance(value, int) else ctypes.byref(value)


def _checked(ended: int) -> None:
    if ended:
        raise MemoryError
