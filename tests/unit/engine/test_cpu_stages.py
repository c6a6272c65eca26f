"""The kernels of a CPU compute what the model's modules compute."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import itertools
import os
import pickle
import shlex
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_model
from tempovlm.api import load
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.plan import Plan, Ranking, Step
from tempovlm.engine.cpu import library as libraries
from tempovlm.engine.cpu.library import Precision, best_precision, fault
from tempovlm.engine.cpu.neighbours import FreeCores, running_in
from tempovlm.engine.cpu.stages import CpuStages, pick_precision, to_compile
from tempovlm.model.cache import KVCache
from tempovlm.model.config import ModelConfig
from tempovlm.model.vlm import Molmo

if (why := fault()) is not None:
    pytest.skip(f"the kernels: {why}", allow_module_level=True)

CONFIG = replace(tiny_model.CONFIG, num_heads=3)
VISION = CONFIG.vision
CLOSE: dict[Precision, float] = {"float32": 1e-5, "bfloat16": 1e-1}
"""Largest difference from torch's float32, relative to the norm: in bfloat16 some tokens visit other experts."""
PRECISIONS: list[Precision] = ["float32", "bfloat16"] if best_precision() == "bfloat16" else ["float32"]
ALL = pytest.mark.parametrize("precision", PRECISIONS)


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without neighbours, so that stages have all their threads."""
    monkeypatch.setattr(FreeCores, "look", lambda _: 64)


@pytest.fixture(scope="module")
def model() -> Molmo:
    return tiny_model.build_model(config=CONFIG)


def plan_of(top_k: int, num_blocks: int, config: ModelConfig = CONFIG) -> Plan:
    ranking = Ranking.evenly_spaced(config.num_blocks)
    return Plan.build(KnobConfig(tier="low", top_k=top_k, num_blocks=num_blocks), ranking, config.shape)


def patches_of(count: int) -> torch.Tensor:
    values = np.random.default_rng(count).standard_normal((count, VISION.num_patches, VISION.patch_values))
    return torch.from_numpy(values.astype(np.float32))


@pytest.mark.usefixtures("idle")
@ALL
@torch.inference_mode()
@pytest.mark.parametrize(("count", "threads"), [(1, 1), (2, 2), (7, 2), (13, 3)])
def test_crops_become_the_same_tokens(model: Molmo, precision: Precision, count: int, threads: int) -> None:
    stages, patches = CpuStages(model, precision, threads), patches_of(count)
    wanted = model.vision(patches)
    assert off(stages.encode(patches), wanted) < CLOSE[precision]
    masks = torch.from_numpy(np.random.default_rng(0).choice([0, 0.5, 1], wanted.shape[:2]).astype(np.float32))
    assert off(stages.project(wanted, masks), model.projector(wanted, masks)) < CLOSE[precision]


@pytest.mark.usefixtures("idle")
@ALL
@torch.inference_mode()
@pytest.mark.parametrize(("top_k", "num_blocks"), [(4, 6), (2, 3), (6, 4)])
@pytest.mark.parametrize("lengths", [None, [9, 114, 3]])
def test_prompts_leave_the_same_logits_and_cache(
    model: Molmo, precision: Precision, top_k: int, num_blocks: int, lengths: list[int] | None
) -> None:
    batch, longest = (1, 101) if lengths is None else (3, 114)
    plan, x = plan_of(top_k, num_blocks), torch.randn(batch, longest, CONFIG.width)
    before, real = x.clone(), None if lengths is None else torch.tensor(lengths)
    one, other = (KVCache.allocate(CONFIG, num_blocks, batch, longest + 4, x) for _ in range(2))
    wanted = model.prefill(x, plan, one, real)
    found = CpuStages(model, precision, 2).prefill(x, plan, other, real)
    assert off(found, wanted) < CLOSE[precision]
    shortest = min(lengths or [longest])
    for a, b in ((one.keys, other.keys), (one.values, other.values)):
        assert off(b[..., :shortest, :], a[..., :shortest, :]) < CLOSE[precision]
        assert not b[..., longest:, :].any(), "room for later tokens is left alone"
    assert torch.equal(x, before), "the caller's embeddings are left alone"


@ALL
@torch.inference_mode()
@pytest.mark.parametrize("length", [1, 15, 40])
def test_tokens_have_the_same_logits(model: Molmo, precision: Precision, length: int) -> None:
    plan, x = plan_of(3, 6), torch.randn(1, length, CONFIG.width)
    one, other = (KVCache.allocate(CONFIG, 6, 1, length + 4, x) for _ in range(2))
    stages = CpuStages(model, precision, 1)
    model.prefill(x, plan, one)
    stages.prefill(x, plan, other)
    for step, token in enumerate([3, 5, 8]):
        wanted = model.decode(torch.tensor([token]), plan, one, length + step)
        assert off(stages.decode(token, plan, other, length + step), wanted) < CLOSE[precision]


@torch.inference_mode()
@pytest.mark.parametrize(("experts", "width"), [(32, 24), (32, 16), (5, 40), (3, 7)])
def test_experts_of_any_number_and_width(experts: int, width: int) -> None:
    config = replace(CONFIG, num_experts=experts, expert_width=width)
    model = tiny_model.build_model(config=config)
    plan, x = plan_of(2, 3, config), torch.randn(1, 50, config.width)
    one, other = (KVCache.allocate(config, 3, 1, 50, x) for _ in range(2))
    assert off(CpuStages(model, "float32", 2).prefill(x, plan, other), model.prefill(x, plan, one)) < 1e-5


@torch.inference_mode()
def test_of_equal_experts_the_first_are_visited(model: Molmo) -> None:
    tied = copy.deepcopy(model)
    for block in tied.decoder.blocks:
        block.moe.router.weight.zero_()
    stages, plan, x = CpuStages(tied, "float32", 1), plan_of(2, 6), torch.randn(1, 9, CONFIG.width)
    one, other = (KVCache.allocate(CONFIG, 6, 1, 9, x) for _ in range(2))
    assert off(stages.prefill(x, plan, other), tied.prefill(x, plan, one)) < 1e-5


@torch.inference_mode()
def test_values_that_are_no_numbers_reach_the_logits(model: Molmo) -> None:
    x = torch.randn(1, 60, CONFIG.width)
    x[0, 7] = float("nan")
    cache = KVCache.allocate(CONFIG, 6, 1, 60, x)
    assert CpuStages(model, best_precision(), 2).prefill(x, plan_of(2, 6), cache).isnan().all()


@torch.inference_mode()
def test_no_token_goes_beyond_the_cache_or_the_positions(model: Molmo) -> None:
    stages, plan = CpuStages(model, "float32", 1), plan_of(2, 6)
    for tokens, capacity in ((9, 8), (CONFIG.max_sequence_length + 1, CONFIG.max_sequence_length + 1)):
        x = torch.randn(1, tokens, CONFIG.width)
        cache = KVCache.allocate(CONFIG, 6, 1, capacity, x)
        with pytest.raises(IndexError, match=f"{tokens} tokens"):
            stages.prefill(x, plan, cache)
        with pytest.raises(IndexError):
            stages.decode(3, plan, cache, capacity)
    for length in (0, 10):
        x = torch.randn(1, 9, CONFIG.width)
        with pytest.raises(IndexError, match="lengths"):
            stages.prefill(x, plan, KVCache.allocate(CONFIG, 6, 1, 12, x), torch.tensor([length]))


SIX = CONFIG.num_blocks


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"shape": (SIX - 1, 1, 3, 12, 16)}, r"keys \(5, 1, 3, 12, 16\)"),
        ({"shape": (SIX, 2, 3, 12, 16)}, r"keys .*, not \(6, 1, 3, 12, 16\)"),
        ({"shape": (SIX, 1, 2, 12, 16)}, "keys"),
        ({"shape": (SIX, 1, 3, 12, 8)}, "keys"),
        ({"values": (SIX, 1, 3, 11, 16)}, "values"),
        ({"dtype": torch.bfloat16}, "keys .* in torch.bfloat16"),
        ({"step": Step(SIX, 2)}, r"step \(6, 2\): the model has 6 blocks of 8 experts"),
        ({"step": Step(-1, 2)}, "step"),
        ({"step": Step(5, 9)}, "step"),
        ({"step": Step(5, 0)}, "step"),
    ],
)
@torch.inference_mode()
def test_no_cache_and_no_plan_of_another_model(model: Molmo, change: dict[str, Any], why: str) -> None:
    stages, plan = CpuStages(model, "float32", 1), plan_of(2, SIX)
    shape, dtype = change.get("shape", (SIX, 1, 3, 12, 16)), change.get("dtype", torch.float32)
    plan = replace(plan, steps=(*plan.steps[:-1], change.get("step", plan.steps[-1])))
    cache = KVCache(torch.zeros(shape, dtype=dtype), torch.zeros(change.get("values", shape), dtype=dtype))
    with pytest.raises((IndexError, ValueError), match=why):
        stages.prefill(torch.randn(1, 9, CONFIG.width), plan, cache)
    with pytest.raises((IndexError, ValueError), match=why):
        stages.decode(3, plan, cache, 9)
    assert not cache.keys.any()


@torch.inference_mode()
def test_a_cache_in_pieces_is_refused(model: Molmo) -> None:
    room = torch.zeros(SIX, 1, 3, 16, 12).transpose(3, 4)
    with pytest.raises(ValueError, match="keys are not contiguous"):
        CpuStages(model, "float32", 1).decode(3, plan_of(2, SIX), KVCache(room, room), 9)


@torch.inference_mode()
def test_no_tensors_of_other_shapes_or_types(model: Molmo) -> None:
    stages, patches, plan = CpuStages(model, "float32", 1), patches_of(2), plan_of(2, SIX)
    for wrong in (patches[:, 1:], patches[..., 1:], patches[0], patches.double()):
        with pytest.raises(ValueError, match=r"patches .* not \(\d+, 144, 192\) in torch.float32 on cpu"):
            stages.encode(wrong)
    features, masks = stages.encode(patches), torch.ones(2, VISION.num_patches)
    for wrong in (features[:, 1:], features[..., 1:], features.half()):
        with pytest.raises(ValueError, match="features"):
            stages.project(wrong, masks)
    for wrong in (masks[:1], masks[:, 1:]):
        with pytest.raises(ValueError, match="masks"):
            stages.project(features, wrong)
    x = torch.randn(2, 9, CONFIG.width)
    cache = KVCache.allocate(CONFIG, SIX, 2, 9, x)
    for wrong in (x[..., 1:], x.double()):
        with pytest.raises(ValueError, match="x "):
            stages.prefill(wrong, plan, cache)
    with pytest.raises(IndexError, match=r"lengths \[9\], of 2 from 1 to 9"):
        stages.prefill(x, plan, cache, torch.tensor([9]))


@pytest.mark.usefixtures("idle")
@torch.inference_mode()
def test_stages_can_be_stopped_between_blocks(model: Molmo) -> None:
    stages, ticks = CpuStages(model, "float32", 2), []
    patches, x = patches_of(5), torch.randn(1, 200, CONFIG.width)
    stages.encode(patches, lambda: ticks.append(0))
    assert 1 <= len(ticks) <= VISION.num_blocks

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.encode(patches, stop)
    cache = KVCache.allocate(CONFIG, 6, 1, 200, x)
    with pytest.raises(KeyboardInterrupt):
        stages.prefill(x, plan_of(2, 6), cache, tick=stop)
    again = stages.prefill(x, plan_of(2, 6), cache)
    assert off(again, stages.prefill(x, plan_of(2, 6), cache, tick=lambda: None)) < 1e-6


@torch.inference_mode()
def test_what_stopped_a_stage_does_not_keep_its_tensors(model: Molmo) -> None:
    stages, x = CpuStages(model, "float32", 1), torch.randn(1, 9, CONFIG.width)
    cache = KVCache.allocate(CONFIG, 6, 1, 9, x)
    keys = weakref.ref(cache.keys)

    def stop() -> None:
        raise KeyboardInterrupt

    gc.disable()
    try:
        with contextlib.suppress(KeyboardInterrupt):
            stages.prefill(x, plan_of(2, 6), cache, tick=stop)
        del cache
        assert keys() is None
    finally:
        gc.enable()


@torch.inference_mode()
def test_a_copy_packs_for_itself(model: Molmo) -> None:
    stages = CpuStages(model, "float32", 2, 4)
    stages.crew.use({"vision_encoder": ((1, 1),)})
    again = pickle.loads(pickle.dumps(stages))
    assert (again.crew.most, again.crew.counts) == (4, stages.crew.counts), (
        "threads of a calibration that it has too"
    )
    assert off(again.encode(patches_of(2)), stages.encode(patches_of(2))) < 1e-6


@pytest.mark.usefixtures("idle")
@torch.inference_mode()
def test_callers_in_threads_share_the_workers(model: Molmo) -> None:
    stages, patches = CpuStages(model, "float32", 2), patches_of(6)
    wanted, found = stages.encode(patches), [torch.zeros(0)] * 4

    def call(i: int) -> None:
        for _ in range(20):
            found[i] = stages.encode(patches)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(len(found))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(torch.equal(one, wanted) for one in found)


@pytest.mark.usefixtures("idle")
def test_a_forked_child_computes_too(model: Molmo) -> None:
    stages, patches = CpuStages(model, "float32", 2), patches_of(6)
    wanted = stages.encode(patches)
    child = os.fork()
    if not child:
        os._exit(0 if off(stages.encode(patches), wanted) < 1e-6 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_only_a_model_that_they_know_is_computed(model: Molmo) -> None:
    class Other(Molmo):
        pass

    wide = replace(VISION, pool=12, margins=(0, 0))
    twice = replace(VISION, feature_layers=(-1, 2))
    others = (
        (copy.deepcopy(model).to(torch.bfloat16), "in float32"),
        (Other(CONFIG), "Molmo's models"),
        (tiny_model.build_model(config=replace(CONFIG, vision=wide)), "at most 64 patches"),
        (tiny_model.build_model(config=replace(CONFIG, vision=twice)), "each layer of the pictures once"),
    )
    for other, why in others:
        with pytest.raises(UserError, match=f"backend='kernels': .*{why}"):
            pick_precision("kernels", None, other)
        assert pick_precision("auto", None, other) is None


def test_what_a_back_end_computes_in(model: Molmo) -> None:
    assert pick_precision("torch", None, model) is None
    assert pick_precision("kernels", torch.float32, model) == "float32"
    assert pick_precision("auto", None, model) == best_precision()
    with pytest.raises(UserError, match="backend='tensorrt': unknown; choose from auto, kernels, torch"):
        pick_precision("tensorrt", None, model)  # type: ignore[arg-type]


COPYING = 'until [ "$1" = -o ]; do shift; done; cp "$0" "$2"'
"""A compiler that has done its work before: six seconds of it."""


@pytest.fixture(scope="module")
def compiled() -> Path:
    return Path(libraries.library(best_precision())._name)


@pytest.fixture(scope="module")
def copier(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a compiler as a command that is called `cc`."""
    path = tmp_path_factory.mktemp("compiler") / "cc"
    path.write_text(f'#!/bin/sh\nexec sh -c {shlex.quote(COPYING)} {shlex.quote(str(compiled))} "$@"\n')
    path.chmod(0o755)
    return path


class Nowhere:
    """A cache folder without libraries, and libraries that are not loaded yet."""

    @pytest.fixture(autouse=True)
    def nothing_is_compiled(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TEMPOVLM_KERNELS_DIR", str(tmp_path / "kernels"))
        monkeypatch.setattr(libraries, "library", libraries.library.__wrapped__)
        monkeypatch.setattr("tempovlm.engine.cpu.stages.library", libraries.library)


class TestWithoutACompiler(Nowhere):
    def test_torch_answers_and_the_log_tells_the_remedy(
        self, model: Molmo, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(libraries, "_compilers", list)
        assert pick_precision("auto", None, model) is None
        assert "needs a C compiler; pip install 'tempovlm[cpu]'" in caplog.text
        with pytest.raises(UserError, match=r"needs a C compiler; pip install 'tempovlm\[cpu\]'"):
            pick_precision("kernels", None, model)

    def test_one_that_fails_is_named(self, model: Molmo, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(libraries, "_compilers", lambda: [["false"], ["/no/such/cc"]])
        assert pick_precision("auto", None, model) is None
        with pytest.raises(UserError, match="could not be compiled: /no/such/cc"):
            pick_precision("kernels", None, model)

    def test_one_of_cc_that_fails_is_named_before_another_compiles(
        self, copier: Path, model: Molmo, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("PATH", f"{copier.parent}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(libraries, "_kept", lambda made, _: made)
        for named in ("false -x", "/no/such/cc", '"b'):
            caplog.clear()
            monkeypatch.setenv("CC", named)
            assert pick_precision("auto", torch.float32, model) == "float32"
            (line,) = caplog.messages
            assert "CC cannot compile the kernels" in line
            assert "correct CC or unset it: " in line
            assert named in line

    def test_none_is_there_though_cc_names_one(self, model: Molmo, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CC", "/no/such/cc")
        monkeypatch.setenv("PATH", "")
        monkeypatch.setattr(libraries, "find_spec", lambda _: None)
        with pytest.raises(UserError, match="needs a C compiler"):
            pick_precision("kernels", None, model)


class TestWithAnOldCompiler(Nowhere):
    def test_the_kernels_run_in_float32(
        self,
        copier: Path,
        model: Molmo,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        compiler, old = shlex.quote(str(copier)), tmp_path / "old"
        old.write_text(
            f'#!/bin/sh\nfor word; do [ "$word" = -mavx512bf16 ] && echo "what is $word?" >&2 && exit 1; done\n'
            f'exec {compiler} "$@"\n'
        )
        old.chmod(0o755)
        monkeypatch.setattr(libraries, "_compilers", lambda: [[str(old)]])
        monkeypatch.setattr("tempovlm.engine.cpu.stages.best_precision", lambda: "bfloat16")
        monkeypatch.setattr(libraries, "instructions", lambda: "avx512-bf16")
        monkeypatch.setattr("ctypes.CDLL", lambda path: path)
        assert pick_precision("auto", None, model) == "float32"
        assert "run in float32, slower than in bfloat16" in caplog.text
        assert "what is -mavx512bf16?" in caplog.text


class TestBeforeTheFirstLoad(Nowhere):
    def test_only_what_will_run_is_to_be_compiled(
        self, copier: Path, model: Molmo, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(libraries, "_compilers", lambda: [[str(copier)]])
        assert to_compile("auto", None, model)
        assert not to_compile("torch", None, model)
        assert not to_compile("auto", None, tiny_model.build_model()), "whose heads are too narrow"
        pick_precision("auto", torch.float32, model)
        assert not to_compile("auto", torch.float32, model)


class TestWhereNothingCanBeWritten(Nowhere):
    def test_they_run_all_the_same(
        self, compiled: Path, model: Molmo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setattr(libraries, "_compilers", lambda: [["sh", "-c", COPYING, str(compiled)]])
        monkeypatch.setenv("TEMPOVLM_KERNELS_DIR", str(tmp_path / "file" / "kernels"))
        assert pick_precision("kernels", None, model) == best_precision()


SHORT_OF_MEMORY = """
#include <pthread.h>
#include <stdlib.h>
__attribute__((visibility("default"))) int is_short; /* 1: of workers, 2: of the caller too */
static pthread_t caller; /* the last to allocate while there was memory */
static void *sometimes(size_t boundary, size_t size)
{
    if (!is_short)
        caller = pthread_self();
    return is_short > !!pthread_equal(pthread_self(), caller) ? NULL : aligned_alloc(boundary, size);
}
#define aligned_alloc sometimes
"""


@pytest.mark.usefixtures("idle")
class TestWithoutMemory(Nowhere):
    @torch.inference_mode()
    def test_the_caller_works_alone_or_is_told(
        self, model: Molmo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "short.h").write_text(SHORT_OF_MEMORY)
        compiler = libraries._compilers()[0]
        monkeypatch.setattr(libraries, "_compilers", lambda: [[*compiler, "-include", str(tmp_path / "short.h")]])
        monkeypatch.setattr(libraries, "_COMMON", [*libraries._COMMON, "-O1"])
        stages, patches, plan = CpuStages(model, "float32", 2), patches_of(20), plan_of(2, 6)
        state = ctypes.c_int.in_dll(stages._kernels, "is_short")
        features = stages.encode(patches)
        masks, x = torch.ones(features.shape[:2]), torch.randn(1, 200, CONFIG.width)
        cache = KVCache.allocate(CONFIG, 6, 1, 201, x)

        calls: list[Callable[[], torch.Tensor]] = [
            lambda: stages.encode(patches),
            lambda: stages.project(features, masks),
            lambda: stages.prefill(x, plan, cache),
            lambda: stages.decode(3, plan, cache, 200),
        ]
        wanted = [call() for call in calls]
        state.value = 2
        for call in calls:
            with pytest.raises(MemoryError):
                call()
        for state.value in (0, *[1] * 20):  # a worker may come too late to matter
            assert all(torch.equal(call(), found) for call, found in zip(calls, wanted, strict=True))


class TestOnOtherProcessors(Nowhere):
    def test_older_ones_compute_in_torch(self, model: Molmo, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
        assert pick_precision("auto", None, model) is None
        with pytest.raises(UserError, match="a processor with AVX2"):
            pick_precision("kernels", None, model)

    @torch.inference_mode()
    def test_those_with_avx2_in_narrower_registers(
        self, model: Molmo, monkeypatch: pytest.MonkeyPatch, cache_home: Path
    ) -> None:
        monkeypatch.setenv("TEMPOVLM_KERNELS_DIR", str(cache_home / "kernels"))  # where it may be compiled already
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        assert pick_precision("auto", None, model) == "float32"
        stages, patches, plan = CpuStages(model, "float32", 2), patches_of(3), plan_of(3, 6)
        assert Path(stages._kernels._name).name.startswith("avx2-float32-")
        features = model.vision(patches)
        masks = torch.ones(features.shape[:2])
        assert off(stages.encode(patches), features) < 1e-5
        assert off(stages.project(features, masks), model.projector(features, masks)) < 1e-5
        x = torch.randn(1, 61, CONFIG.width)
        one, other = (KVCache.allocate(CONFIG, 6, 1, 64, x) for _ in range(2))
        assert off(stages.prefill(x, plan, other), model.prefill(x, plan, one)) < 1e-5
        wanted = model.decode(torch.tensor([4]), plan, one, 61)
        assert off(stages.decode(4, plan, other, 61), wanted) < 1e-5


def test_two_looks_must_see_a_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempovlm.engine.cpu.neighbours.cpus", lambda: 4)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    cores, seen, time_ms = FreeCores(), iter([1, 3, 1, 3, 4, 9, 9, 1]), itertools.count(10.0, 0.5)
    monkeypatch.setattr(os, "pread", lambda *_: b"0.5 0.5 0.5 %d/99 7\n" % next(seen))
    monkeypatch.setattr("tempovlm.engine.cpu.neighbours.now_ms", lambda: next(time_ms))
    found = [cores.look() for _ in range(16)]
    assert found[::2] == [4, 4, 4, 4, 2, 1, 1, 4]
    assert found[1::2] == found[::2], "half a millisecond later it is the same look"


def test_a_part_of_the_cores_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempovlm.engine.cpu.neighbours.cpus", lambda: 3)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "pread", lambda *_: b"0.5 0.5 0.5 64/99 7\n")
    assert FreeCores().look() == 3


def test_a_load_that_cannot_be_read_leaves_all_cores_free(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> bytes:
        raise OSError("no such process")

    monkeypatch.setattr("tempovlm.engine.cpu.neighbours.cpus", lambda: 4)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    cores = FreeCores()
    monkeypatch.setattr(os, "pread", fails)
    assert [cores.look(), cores.look()] == [4, 4]


@pytest.mark.parametrize(("load", "count"), [(b"0.1 0.2 0.3 2/80 11", 2), (b"0 0 0 0/0 0", 1), (b"", 1)])
def test_the_count_of_running_threads(load: bytes, count: int) -> None:
    assert running_in(load) == count


def test_a_loaded_model_answers_by_them(tmp_path: Path, picture: Image.Image) -> None:
    quick: dict[str, Any] = {"warmup": False, "progress": False, "calibrate": False, "device": "cpu"}
    folder = tiny_model.save_folder(tmp_path, CONFIG)
    plain, fast = (load(str(folder), backend=name, dtype=torch.float32, **quick) for name in ("torch", "auto"))
    asked = [(picture, "what is the sign?"), (None, "how many dogs?"), (picture, "what color is the dog?")]
    for tier in ("low", "high"):
        wanted = [plain.answer(*pair, tier=tier, max_new_tokens=4).tokens for pair in asked]
        assert [fast.answer(*pair, tier=tier, max_new_tokens=4).tokens for pair in asked] == wanted
        batch = fast.answer_batch(asked, tier=tier, max_new_tokens=4)
        assert [answer.tokens for answer in batch] == wanted
    assert fast.stamp().device.startswith("cpu/float32/float32-avx")
    assert plain.stamp().device == "cpu/float32"
    for one, backend in ((plain, "torch"), (fast, f"kernels (float32-{libraries.instructions()})")):
        assert one.answer(None, "what?", max_new_tokens=1).to_json()["backend"] == backend
        assert f", float32, backend {backend}, " in repr(one)
