"""Decode steps on weights of one byte: what reads them, what does not, and where they cannot be had."""

from __future__ import annotations

import pytest
import torch

import tiny_model
from tempovlm.control.guard import Guard
from tempovlm.core.decode_dtype import DecodeDtype
from tempovlm.core.errors import UserError
from tempovlm.core.request import Request
from tempovlm.engine.cuda import graphs
from tempovlm.engine.cuda.graphs import GraphDecoder, check_decode_dtype
from tempovlm.engine.engine import Engine
from tempovlm.engine.environment import collect_stamp, fingerprint
from tempovlm.engine.runner import Runner
from tempovlm.model.narrow import NarrowDecoder
from tempovlm.model.quantised import imitate

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("weights", "device", "has_triton", "capability", "named"),
    [
        ("fp4", CUDA, True, (9, 0), "weights='fp4': unknown; choose from bf16, fp8, int8"),
        ("int8", CPU, True, (9, 0), "weights='int8': only for decoding on CUDA"),
        ("fp8", CUDA, False, (9, 0), "needs Triton"),
        ("fp8", CUDA, True, (8, 0), "use int8"),
    ],
)
def test_weights_that_cannot_be_read_are_refused(
    weights: str,
    device: torch.device,
    has_triton: bool,
    capability: tuple[int, int],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graphs, "HAS_TRITON", has_triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with pytest.raises(UserError, match="weights=") as refused:
        check_decode_dtype(weights, device)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("weights", "capability"), [("fp8", (8, 9)), ("fp8", (9, 0)), ("int8", (8, 0))])
def test_weights_that_can_be_read(
    weights: str, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    check_decode_dtype(weights, CUDA)
    check_decode_dtype("bf16", CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what the interpreter runs; see tests/gpu")
@pytest.mark.parametrize("weights", ["fp8", "int8"])
def test_steps_read_them_and_prompts_do_not(engine: Engine, weights: DecodeDtype) -> None:
    pytest.importorskip("triton")
    from tempovlm.model.kernels.tiles import Tile, Tiling

    tile = Tile(64, 64)
    tiling = Tiling(tile, tile, tile, tile, tile, tile, splits=2, tokens=64)
    run = engine.runner
    assert weights != "bf16"
    ours, plain = (Engine(run.model, run.tokenizer, name="tiny") for _ in range(2))
    ours.runner = Runner(
        run.model, run.tokenizer, graphs=GraphDecoder(run.model, tiling=tiling, decode_dtype=weights)
    )
    narrow = NarrowDecoder.of(imitate(run.model.decoder, weights))
    plain.runner = Runner(run.model, run.tokenizer, narrow=narrow)
    # A question whose second token hangs on the weights' precision.
    request = Request(images=(), question="what does the sign?", max_new_tokens=6)
    guard = Guard.fixed(engine.space.cheapest, engine.space)
    tokens = ours.answer(request, guard).tokens
    assert tokens == plain.answer(request, guard).tokens != engine.answer(request, guard).tokens
    assert (ours.runner.decode_dtype, engine.runner.decode_dtype) == (weights, "bf16")


def test_machines_are_measured_again_for_them() -> None:
    stamps = [
        collect_stamp(
            model="tiny",
            weights_hash="w",
            space=tiny_model.SPACE,
            device=CPU,
            dtype=torch.float32,
            decode_dtype=weights,
        )
        for weights in ("bf16", "fp8", "int8")
    ]
    assert [one.device for one in stamps] == ["cpu/float32", "cpu/float32/fp8", "cpu/float32/int8"]
    assert len({fingerprint(one) for one in stamps}) == 3
