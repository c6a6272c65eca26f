"""Stages that OpenVINO compiled compute what the model's modules compute."""

from __future__ import annotations

import copy
import pickle
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
from tempovlm.core.plan import Plan, Ranking
from tempovlm.model.cache import KVCache
from tempovlm.model.vlm import Molmo

pytest.importorskip("openvino", reason="needs OpenVINO: pip install 'tempovlm[cpu]'")

from tempovlm.engine.cpu.stages import CROPS_A_TICK, CpuStages, best_precision, pick_precision

CONFIG, VISION = tiny_model.CONFIG, tiny_model.CONFIG.vision
CLOSE = 1e-4
"""Largest difference between float32 results of the two, whose sums run in another order."""


@pytest.fixture(scope="module")
def model() -> Molmo:
    return tiny_model.build_model()


@pytest.fixture(scope="module")
def stages(model: Molmo) -> CpuStages:
    return CpuStages.of(model, "float32", 1)


def plan_of(top_k: int, num_blocks: int) -> Plan:
    ranking = Ranking.evenly_spaced(CONFIG.num_blocks)
    return Plan.build(KnobConfig(tier="low", top_k=top_k, num_blocks=num_blocks), ranking, CONFIG.shape)


def patches_of(count: int) -> torch.Tensor:
    values = np.random.default_rng(count).standard_normal((count, VISION.num_patches, VISION.patch_values))
    return torch.from_numpy(values.astype(np.float32))


@torch.inference_mode()
@pytest.mark.parametrize("count", [1, 2, 7, 13])
def test_crops_become_the_same_tokens(model: Molmo, stages: CpuStages, count: int) -> None:
    patches = patches_of(count)
    wanted = model.vision(patches)
    assert torch.allclose(stages.encode(patches), wanted, atol=CLOSE)
    masks = torch.from_numpy(np.random.default_rng(0).choice([0, 0.5, 1], wanted.shape[:2]).astype(np.float32))
    assert torch.allclose(stages.project(wanted, masks), model.projector(wanted, masks), atol=CLOSE)


@torch.inference_mode()
@pytest.mark.parametrize(("top_k", "num_blocks"), [(4, 6), (2, 3), (6, 4)])
@pytest.mark.parametrize("lengths", [None, [9, 14, 3]])
def test_prompts_leave_the_same_logits_and_cache(
    model: Molmo, stages: CpuStages, top_k: int, num_blocks: int, lengths: list[int] | None
) -> None:
    batch, longest = (1, 11) if lengths is None else (3, 14)
    plan, x = plan_of(top_k, num_blocks), torch.randn(batch, longest, CONFIG.width)
    real = None if lengths is None else torch.tensor(lengths)
    one, other = (KVCache.allocate(CONFIG, num_blocks, batch, longest + 4, x) for _ in range(2))
    wanted, found = model.prefill(x, plan, one, real), stages.prefill(x, plan, other, real)
    assert torch.allclose(found, wanted, atol=CLOSE)
    shortest = min(lengths or [longest])
    for a, b in ((one.keys, other.keys), (one.values, other.values)):
        assert torch.allclose(a[..., :shortest, :], b[..., :shortest, :], atol=CLOSE)
        assert not b[..., longest:, :].any(), "room for later tokens is left alone"


@torch.inference_mode()
def test_of_equal_experts_the_first_are_visited(model: Molmo) -> None:
    tied = copy.deepcopy(model)
    for block in tied.decoder.blocks:
        block.moe.router.weight.zero_()
    stages, plan, x = CpuStages.of(tied, "float32", 1), plan_of(2, 6), torch.randn(1, 9, CONFIG.width)
    one, other = (KVCache.allocate(CONFIG, 6, 1, 9, x) for _ in range(2))
    assert torch.allclose(stages.prefill(x, plan, other), tied.prefill(x, plan, one), atol=CLOSE)


@torch.inference_mode()
def test_both_stages_can_be_stopped_between_pieces(stages: CpuStages) -> None:
    ticks: list[int] = []
    patches = patches_of(2 * CROPS_A_TICK + 1)
    assert len(stages.encode(patches, lambda: ticks.append(0))) == len(patches)
    assert len(ticks) == 3
    x = torch.randn(1, 9, CONFIG.width)
    stages.prefill(x, plan_of(2, 4), KVCache.allocate(CONFIG, 4, 1, 9, x), tick=lambda: ticks.append(1))
    assert len(ticks) == 3 + 4


@torch.inference_mode()
def test_results_outlive_the_next_run(stages: CpuStages) -> None:
    first = stages.encode(patches_of(3))
    before = first.clone()
    stages.encode(patches_of(3) + 1)
    assert torch.allclose(first, before)


@torch.inference_mode()
def test_a_copy_compiles_for_itself(stages: CpuStages) -> None:
    again = pickle.loads(pickle.dumps(stages))
    assert torch.allclose(again.encode(patches_of(2)), stages.encode(patches_of(2)), atol=CLOSE)


def test_only_the_model_that_it_knows_is_compiled(model: Molmo) -> None:
    class Other(Molmo):
        pass

    for other in (copy.deepcopy(model).to(torch.bfloat16), Other(CONFIG)):
        with pytest.raises(UserError, match="backend='openvino': runs Molmo's models, loaded in float32"):
            CpuStages.of(other, "float32", 1)


def test_what_a_back_end_computes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_precision("torch", None) is None
    assert pick_precision("openvino", torch.float32) == "float32"
    assert pick_precision("openvino", None) == best_precision()
    with pytest.raises(UserError, match="backend='tensorrt': unknown; choose from torch, openvino"):
        pick_precision("tensorrt", None)  # type: ignore[arg-type]
    monkeypatch.setattr("tempovlm.engine.cpu.stages.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"not installed; pip install 'tempovlm\[cpu\]'"):
        pick_precision("openvino", None)


def test_a_loaded_model_answers_by_it(tiny_folder: Path, picture: Image.Image) -> None:
    quick: dict[str, Any] = {"warmup": False, "progress": False, "calibrate": False, "dtype": torch.float32}
    plain, compiled = (load(str(tiny_folder), backend=name, **quick) for name in ("torch", "openvino"))
    asked = [(picture, "what is the sign?"), (None, "how many dogs?"), (picture, "what color is the dog?")]
    for tier in ("low", "high"):
        wanted = [plain.answer(*pair, tier=tier, max_new_tokens=4).tokens for pair in asked]
        assert [compiled.answer(*pair, tier=tier, max_new_tokens=4).tokens for pair in asked] == wanted
        batch = compiled.answer_batch(asked, tier=tier, max_new_tokens=4)
        assert [answer.tokens for answer in batch] == wanted
    assert compiled.stamp().device.startswith("cpu/float32/float32-openvino-")
    assert compiled.stamp().device != plain.stamp().device
