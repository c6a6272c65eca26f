"""Controllers as policies over whole settings: (B, K) log-probabilities for a batch of questions under budgets.

A network gives logits for each knob; here they become one distribution over the settings in index order, with what
is masked left out, so that the log-probability of a setting is the sum over its knobs. Features are looked up by
question. Shapes: `N` questions, `B` of a batch, `T` tiers, `K` settings, `A` top-ks times depths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tempovlm.control.learned.llm_based import FirstBlocks, LLMBasedController, Reading
from tempovlm.control.learned.networks import Knob2Knob3Predictor, TwoStageController, tier_logits
from tempovlm.data.sample import Sample
from tempovlm.lab.fit import seeded
from tempovlm.lab.grpo.environment import LEAST_LEFT, MASKED, Batch, Environment, GrpoJob, limits_ms


@dataclass(frozen=True, eq=False)
class Shared:
    """Features and models that a policy looks at and does not own: copies of the policy share them.

    Attributes:
        language: (N, L). vision: (N, T, V) at each tier. glance: (N, V) of the global crop.
    """

    language: Tensor
    vision: Tensor
    glance: Tensor

    @classmethod
    def of(cls, job: GrpoJob, samples: Sequence[Sample]) -> Shared:
        """Features of all questions on the training device, stored beside the results when first made."""
        found = job.features(job.results_dirs[0], samples)
        arrays = (found.language, found.vision, found.glance)
        return cls(*(torch.as_tensor(array, device=job.options.device) for array in arrays))

    def __deepcopy__(self, memo: Any) -> Shared:
        return self


class TwoStageActor(nn.Module):
    """The two-stage controller, with both stages learning, or with a first stage that is given.

    Where the first stage is given it chooses as when serving: the likeliest of the allowed tiers.
    """

    def __init__(self, controller: TwoStageController, shared: Shared, *, learn_tier: bool) -> None:
        super().__init__()
        self.controller = controller
        self.shared = shared
        self.learn_tier = learn_tier
        controller.knob1.requires_grad_(learn_tier)

    def forward(self, batch: Batch) -> Tensor:
        """(B, K) log-probabilities."""
        device = self.shared.language.device
        rows, budget_ms = batch.rows.to(device), batch.budget_ms.to(device, torch.float32)
        language, vision = self.shared.language[rows], self.shared.vision[rows]
        B, T, _ = vision.shape
        with torch.set_grad_enabled(self.learn_tier and torch.is_grad_enabled()):
            tiers = tier_logits(self.controller.knob1, language, budget_ms, self.shared.glance[rows])
        left_ms = batch.left_ms.to(device, torch.float32).flatten()
        every_tier = torch.arange(T, device=device).repeat(B)
        top_k, blocks = self.controller.knob2knob3(
            vision.flatten(0, 1), language.repeat_interleave(T, dim=0), left_ms, every_tier
        )
        compute = (top_k.unsqueeze(2) + blocks.unsqueeze(1)).view(B, T, -1)
        if batch.allowed is not None:
            allowed = batch.allowed.to(device).view(compute.shape)
            compute = compute.masked_fill(~allowed, MASKED)
            tiers = tiers.masked_fill(~allowed.any(dim=2), MASKED)
        first = tiers.log_softmax(dim=1) if self.learn_tier else _given(tiers.argmax(dim=1), T)
        if batch.tiers is not None:
            outside = batch.tiers.to(device)
            first = torch.where((outside >= 0).unsqueeze(1), _given(outside.clamp(min=0), T), first)
        return (first.unsqueeze(2) + compute.log_softmax(dim=2)).flatten(1)


def _given(tier: Tensor, num_tiers: int) -> Tensor:
    """(B, T) logarithms of certainty about tiers (B,)."""
    one_hot = nn.functional.one_hot(tier, num_tiers)
    return torch.zeros(one_hot.shape, device=tier.device).masked_fill(one_hot == 0, MASKED)


@dataclass(frozen=True, eq=False)
class SharedReading:
    """State of a model's first blocks after every question (N), and the model."""

    model: FirstBlocks
    reading: Reading

    def __deepcopy__(self, memo: Any) -> SharedReading:
        return self


class LlmActor(nn.Module):
    """The LLM-based controller: three heads at once, from what the model's first blocks have read."""

    def __init__(self, controller: LLMBasedController, shared: SharedReading) -> None:
        super().__init__()
        self.controller = controller
        self.shared = shared

    def forward(self, batch: Batch) -> Tensor:
        """(B, K) log-probabilities."""
        reading = self.shared.reading
        device = reading.keys.device
        part = reading.take(batch.rows.to(device))
        budget_ms = batch.budget_ms.to(device, torch.float32)
        tier, top_k, blocks = self.controller.decide(self.shared.model, part, budget_ms)
        joint = tier[:, :, None, None] + top_k[:, None, :, None] + blocks[:, None, None, :]
        joint = joint.flatten(1)
        if batch.allowed is not None:
            joint = joint.masked_fill(~batch.allowed.to(device), MASKED)
        return joint.log_softmax(dim=1)


def new_second_stage(env: Environment, shared: Shared, hidden_dim: int, seed: int) -> Knob2Knob3Predictor:
    """Untrained, with inputs standardised by the training questions."""
    space, (least_ms, most_ms) = env.space, limits_ms(env)
    rows = torch.as_tensor(env.table.rows("train"), device=shared.language.device)
    widths = shared.vision.shape[-1], shared.language.shape[-1]
    net = seeded(seed, lambda: Knob2Knob3Predictor(*widths, hidden_dim, **space.counts))
    soften(net.trunk)
    net.fit_inputs(shared.vision[rows].flatten(0, 1), shared.language[rows])
    net.budget.fit((LEAST_LEFT * least_ms, most_ms))
    return net


def soften(trunk: nn.Sequential) -> None:
    """Begin with all settings equally likely: what is never drawn is never learned."""
    last = trunk[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight.mul_(0.1)
        last.bias.zero_()
