from __future__ import annotations

import pytest

from tempovlm.core.cost import plan_cost
from tempovlm.core.knobs import KnobConfig, KnobSpace
from tempovlm.core.plan import Plan, Ranking
from tempovlm.core.shape import ModelShape

MOLMOE = ModelShape(
    num_blocks=16,
    num_experts=64,
    top_k=8,
    width=2048,
    expert_width=1024,
    vocab_size=50304,
    image_blocks=22,
    image_width=1024,
    image_mlp_width=4096,
    image_patches=576,
    patch_values=588,
    crop_tokens_side=12,
)
RANKING = Ranking.evenly_spaced(16)


def plan(top_k: int = 8, num_blocks: int = 16) -> Plan:
    return Plan.build(KnobConfig(tier="high", top_k=top_k, num_blocks=num_blocks), RANKING, MOLMOE)


def test_a_decode_step_of_molmoe_moves_its_active_weights() -> None:
    """About 1.2 B of the 7 B weights are active: attention, eight experts a block, the head."""
    one, two = (plan_cost(plan(), MOLMOE, 0, 0, 1, n, value_bytes=1) for n in (1, 2))
    assert one.flops["decode"] == one.bytes["decode"] == 0
    assert two.bytes["decode"] == pytest.approx(1.18e9, rel=0.02)
    assert two.flops["decode"] == pytest.approx(2 * two.bytes["decode"], rel=0.01)


def test_prefill_reads_every_expert_once_and_grows_faster_than_its_tokens() -> None:
    short, long = (plan_cost(plan(), MOLMOE, 13, n, 50, 1) for n in (1000, 2000))
    assert long.bytes["prefill"] == short.bytes["prefill"] == pytest.approx(2 * 6.8e9, rel=0.03)
    assert long.flops["prefill"] / short.flops["prefill"] > 2050 / 1050


def test_one_crop_of_the_vision_transformer() -> None:
    """ViT-L/14 at 336 px: about 0.16 TFLOP of products for 577 tokens and 22 blocks, and attention."""
    cost = plan_cost(plan(), MOLMOE, 2, 288, 20, 1, distinct_crops=1)
    products = 22 * 2 * 577 * 12 * 1024**2
    assert cost.flops["vision_encoder"] == pytest.approx(products, rel=0.12)
    twice = plan_cost(plan(), MOLMOE, 2, 288, 20, 1)
    assert twice.flops["vision_encoder"] == 2 * cost.flops["vision_encoder"]
    assert twice.flops["projector"] == cost.flops["projector"] > 0


def test_no_picture_costs_no_vision() -> None:
    cost = plan_cost(plan(), MOLMOE, 0, 0, 20, 3)
    assert cost.flops["vision_encoder"] == cost.bytes["vision_encoder"] == cost.bytes["projector"] == 0
    assert cost.total_flops == sum(cost.flops.values())
    assert cost.total_bytes == sum(cost.bytes.values())


def test_every_knob_raises_the_cost() -> None:
    space = KnobSpace.for_model(MOLMOE)
    costs = [
        [plan_cost(plan(k, n), MOLMOE, 13, 1000, 40, 8).total_flops for n in space.block_counts]
        for k in space.top_ks
    ]
    assert all(row == sorted(set(row)) for row in costs)
    assert all(list(column) == sorted(set(column)) for column in zip(*costs, strict=True))
