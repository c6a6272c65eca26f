"""Runs a model's stages on a CPU with OpenVINO: the vision transformer, the projector and the reading of prompts.

A graph is compiled when it is first needed, and kept; each block has its own, so that all depths share them.
States between blocks, and the keys and values that a prompt leaves, are float32 whatever the products are.
OpenVINO's threads do not survive a fork, so a forked child computes with the torch modules.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from tempovlm.core.checks import wrong_argument
from tempovlm.core.decode_dtype import Backend
from tempovlm.core.plan import Plan
from tempovlm.engine.watch import Tick
from tempovlm.model.cache import KVCache
from tempovlm.model.decoder import Block, is_plain
from tempovlm.model.family import VisionLanguageModel
from tempovlm.model.vlm import Molmo

Precision = Literal["float32", "bfloat16"]
"""Type in which products are computed."""

CROPS_A_TICK = 4
"""Crops that are encoded between two looks at the clock."""

TOKENS = 16
"""Prompts are padded to a multiple of it: a graph that runs with a new shape takes a tenth longer."""

_HINTS: dict[Precision, str] = {"float32": "f32", "bfloat16": "bf16"}


def pick_precision(backend: Backend, dtype: torch.dtype | None) -> Precision | None:
    """Return the type in which compiled stages compute; None for torch, which runs the modules.

    Args:
        backend: what runs the stages.
        dtype: that the caller asked for. Default: bfloat16 where the processor has instructions for it.

    Raises:
        UserError: the back end is unknown or not installed.
    """
    if backend not in get_args(Backend):
        raise wrong_argument("backend", backend, f"unknown; choose from {', '.join(get_args(Backend))}")
    if backend == "torch":
        return None
    if find_spec("openvino") is None:
        raise wrong_argument("backend", backend, "not installed; pip install 'tempovlm[cpu]'")
    return best_precision() if dtype is None else "float32"


def best_precision() -> Precision:
    """Return bfloat16 where the processor has instructions for it, else float32."""
    import openvino

    capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "bfloat16" if "BF16" in capabilities else "float32"


class CpuStages:
    """The compiled stages of one model.

    Attributes:
        precision: type of the products.
        threads: of a stage.
    """

    def __init__(self, model: Molmo, precision: Precision, threads: int) -> None:
        import openvino

        self._model, self.precision, self.threads = model, precision, threads
        self._core, self._process = openvino.Core(), os.getpid()
        self._requests: dict[Any, Any] = {}

    @classmethod
    def of(cls, model: VisionLanguageModel, precision: Precision, threads: int) -> CpuStages:
        """Compile for a model.

        Raises:
            UserError: the graphs would compute something else.
        """
        weight = next(model.parameters())
        is_known = type(model) is Molmo and is_plain(model.decoder)
        if not is_known or weight.device.type != "cpu" or weight.dtype != torch.float32:
            fault = "runs Molmo's models, loaded in float32 on a CPU; leave it out for this one"
            raise wrong_argument("backend", "openvino", fault)
        return cls(cast(Molmo, model), precision, threads)

    def __reduce__(self) -> tuple[Callable[..., CpuStages], tuple[Molmo, Precision, int]]:
        """Copies and other processes compile again."""
        return CpuStages.of, (self._model, self.precision, self.threads)

    @property
    def name(self) -> str:
        """Type of the products, and the library with its version, as a stamp has them."""
        return f"{self.precision}-openvino-{version('openvino')}"

    @property
    def can_run(self) -> bool:
        """Whether this process is the one that compiled."""
        return os.getpid() == self._process

    def encode(self, patches: Tensor, tick: Tick | None = None) -> Tensor:
        """Return the features (C, P, F) of patches (C, P, patch values).

        `tick` is called before every few crops, and may raise.
        """
        from tempovlm.engine.cpu import graphs

        request = self._request("vision", lambda: graphs.vision_graph(self._model.vision))
        done = []
        for part in [patches] if tick is None else patches.split(CROPS_A_TICK):
            if tick is not None:
                tick()
            done.append(_copied(_run(request, _tensor(part))[0]))
        return done[0] if len(done) == 1 else torch.cat(done)

    def project(self, features: Tensor, masks: Tensor) -> Tensor:
        """Return the tokens (C, G, D) of features (C, P, F) and shares of real pixels (C, P)."""
        from tempovlm.engine.cpu import graphs

        request = self._request("projector", lambda: graphs.projector_graph(self._model.projector))
        return _copied(_run(request, _tensor(features), _tensor(masks))[0])

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
        from tempovlm.engine.cpu import graphs

        decoder, (B, T, _) = self._model.decoder, x.shape
        room = min(-T % TOKENS, len(decoder.rotary.cos) - T)
        x = torch.nn.functional.pad(x, (0, 0, 0, room))
        tables = [_tensor(table[None, None, : T + room]) for table in (decoder.rotary.cos, decoder.rotary.sin)]
        keys, values, states = cache.keys.numpy(), cache.values.numpy(), _tensor(x)
        for i, (index, top_k) in enumerate(plan.steps):
            if tick is not None:
                tick()
            block = cast(Block, decoder.blocks[index])
            request = self._request(("block", index), partial(graphs.block_graph, block))
            states, key, value = _run(request, states, *tables, _tensor(torch.tensor(top_k)))
            keys[i, :, :, :T], values[i, :, :, :T] = key.data[:, :, :T], value.data[:, :, :T]
        ends = [T] * B if lengths is None else lengths.tolist()
        last = torch.from_numpy(states.data[np.arange(B), np.array(ends) - 1])
        return _copied(_run(self._request("head", lambda: graphs.head_graph(decoder)), _tensor(last))[0])

    def _request(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return the request of a graph, which is compiled when it is first needed."""
        request = self._requests.get(key)
        if request is None:
            options = {
                "INFERENCE_PRECISION_HINT": _HINTS[self.precision],
                "INFERENCE_NUM_THREADS": self.threads,
                "PERFORMANCE_HINT": "LATENCY",
                "ENABLE_CPU_PINNING": False,
            }
            request = self._core.compile_model(make(), "CPU", options).create_infer_request()
            self._requests[key] = request
        return request


def _tensor(values: Tensor) -> Any:
    """Return OpenVINO's tensor on the same memory."""
    from openvino import Tensor as Shared

    return Shared(values.contiguous().numpy(), shared_memory=True)


def _run(request: Any, *inputs: Any) -> list[Any]:
    """Run a request; its outputs hold until it runs again. Tensors that are set cost less than arrays given."""
    for i, one in enumerate(inputs):
        request.set_input_tensor(i, one)
    request.infer()
    return list(request.output_tensors)


def _copied(output: Any) -> Tensor:
    return torch.from_numpy(output.data.copy())
