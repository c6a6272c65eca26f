"""Two prompts read in one pass and decoded beside one of another plan; small enough for a memory checker."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch

import tiny_model
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.plan import Plan, Step
from tempovlm.engine.cuda.capture import Recorder
from tempovlm.engine.cuda.rows import PACK_BUCKETS, Rows
from tempovlm.engine.sampling import greedy
from tempovlm.model.cache import KVCache
from tempovlm.model.config import POCKET

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CONFIG = replace(POCKET, num_blocks=2, max_sequence_length=256)
LENGTHS, STEPS = (37, 20, 51), 3


def plan_of(blocks: Iterable[int]) -> Plan:
    """All experts: rounding cannot change the choice."""
    steps = tuple(Step(i, CONFIG.num_experts) for i in blocks)
    return Plan(KnobConfig(tier="low", top_k=CONFIG.num_experts, num_blocks=len(steps)), steps)


@torch.inference_mode()
@pytest.mark.parametrize("is_captured", [False, True])
def test_packed_prompts_decode_beside_another_plan_as_alone(is_captured: bool) -> None:
    """Captured, a pack has padding; tokens may differ where float32 finds two almost equally likely."""
    model, exact = tiny_model.rounded_pair(CONFIG, "cuda")
    recorder = Recorder.on(torch.device("cuda", 0))
    assert recorder is not None
    rows, both, short = Rows(model, recorder), plan_of((0, 1)), plan_of((0,))
    if is_captured:
        rows.capture(("prompts", both.steps, PACK_BUCKETS[0]))
        rows.capture(("step", both.steps, 4))
    plans = both, both, short
    prompts = [model.decoder.embed(torch.randint(0, 1000, (length,), device="cuda")) for length in LENGTHS]
    caches, alone = [], []
    for x, plan in zip(prompts, plans, strict=True):
        caches.append(KVCache.allocate(CONFIG, len(plan.steps), 1, len(x) + STEPS + 1, x.float()))
        alone.append(exact.prefill(x.float().unsqueeze(0), plan, caches[-1]))
    logits = torch.cat([rows.read(prompts[:2], [0, 1], both), rows.read(prompts[2:], [2], short)]).float()
    for ours, wanted in zip(logits, alone, strict=True):
        assert (ours - wanted[0]).norm() <= 2e-2 * wanted.norm()
    tokens = [greedy(one) for one in alone]
    rows.join([0, 1], both, LENGTHS[:2], torch.cat(tokens[:2]))
    rows.join([2], short, LENGTHS[2:], tokens[2])
    for step in range(STEPS):
        made = rows.advance().read()
        for i, plan in enumerate(plans):
            wanted = exact.decode(tokens[i], plan, caches[i], LENGTHS[i] + step)
            assert wanted.max() - wanted[0, made[i]] <= 0.1 * wanted.std()
            tokens[i] = torch.tensor([made[i]], device="cuda")  # both go on with the same one
