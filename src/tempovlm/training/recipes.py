"""Recipes of the pocket model: the options of a run, and the candidates among which short runs choose.

All candidates learn with eight questions a picture, and differ in what a smaller top-k or depth takes away. Narrow
experts leave little width where few of them run, and `spread` keeps the router from giving the first few all the
weight. No setting is left untrained to make it worse: each gets its share of the steps, with the loss of its own
answers, and where it is `taught` also that of the native setting's answers to the same pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from tempovlm.core.errors import UserError
from tempovlm.lab.script import flag
from tempovlm.model.config import POCKET, ModelConfig

MAX_SIZE_MB = 24.0
"""Most that the weights of a pocket may take, in bfloat16."""

RUN_MINUTES = 24.0
"""Minutes of a whole run of a named recipe, unless `total_minutes` or the pilot's own minutes say otherwise."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """All options of a run; written beside its results."""

    steps: int = flag(9700, "steps in all")
    decay_steps: int = flag(3000, "last steps, in which the learning rate falls to zero")
    vision_steps: int = flag(1000, "first steps, which train the vision side alone")
    batch: int = flag(256, "pictures of a step")
    passes: int = flag(2, "steps on each batch of pictures")
    lr: float = flag(1.2e-3, "learning rate of Muon")
    decay: float = flag(0.05, "weight decay")
    warmup: int = flag(300, "steps in which the learning rate rises")
    dense_weight: float = flag(0.25, "weight of the loss of dense labels")
    balance_weight: float = flag(0.01, "weight of the loss that balances the experts")
    spread_weight: float = flag(0.0, "weight of the loss that spreads a token's router over its experts")
    elastic_after: int = flag(5000, "step from which settings are drawn at random")
    elastic_share: float = flag(0.18, "share of these steps at another top-k or depth than the native ones")
    taught_weight: float = flag(0.0, "weight of a smaller setting's divergence from the native setting's answers")
    num_experts: int = flag(POCKET.num_experts, "experts of a block")
    expert_width: int = flag(POCKET.expert_width, "hidden units of an expert")
    questions: int = flag(0, "questions of a training picture; 0: as many as its data set asks")
    total_minutes: float = flag(0.0, "minutes of the whole run, whose course follows the clock; 0: the steps")
    seed: int = flag(0, "seed of the weights and of the training pictures")
    validation_seed: int = flag(20_000, "seed of the validation pictures")
    validation_batches: int = flag(8, "batches of a validation")

    @property
    def config(self) -> ModelConfig:
        """Return the sizes of the model."""
        return replace(POCKET, num_experts=self.num_experts, expert_width=self.expert_width)


_BASE = Recipe(questions=8)
_TAUGHT: dict[str, Any] = {"taught_weight": 1.0, "elastic_share": 0.3}
_SPREAD: dict[str, Any] = {"spread_weight": 0.01}
_SPREAD_MORE: dict[str, Any] = {"spread_weight": 0.03}
_16X48: dict[str, Any] = {"num_experts": 16, "expert_width": 48}
_32X24: dict[str, Any] = {"num_experts": 32, "expert_width": 24}
_32X16: dict[str, Any] = {"num_experts": 32, "expert_width": 16}

RECIPES: dict[str, Recipe] = {
    "16x48": replace(_BASE, **_16X48),
    "16x48-taught": replace(_BASE, **_16X48, **_TAUGHT),
    "32x24": replace(_BASE, **_32X24),
    "32x24-spread": replace(_BASE, **_32X24, **_SPREAD),
    "32x24-spread-more": replace(_BASE, **_32X24, **_SPREAD_MORE),
    "32x24-taught": replace(_BASE, **_32X24, **_TAUGHT),
    "32x16": replace(_BASE, **_32X16),
    "32x16-spread": replace(_BASE, **_32X16, **_SPREAD),
    "32x16-taught": replace(_BASE, **_32X16, **_TAUGHT),
    "32x16-taught-spread": replace(_BASE, **_32X16, **_TAUGHT, **_SPREAD),
}
"""Candidates by name: number and width of the experts, all top-8, and how they are trained."""


def find_recipe(name: str | None, options: Mapping[str, Any]) -> Recipe:
    """Return a named recipe, or the default one without a name, in which some options are others.

    Raises:
        UserError: there is none of this name.
    """
    if name is not None and name not in RECIPES:
        raise UserError(f"--recipe {name}: choose from {', '.join(RECIPES)}")
    return replace(Recipe() if name is None else RECIPES[name], **options)


def name_of(recipe: Recipe) -> str:
    """Return the name of the candidate that a recipe is, but for seeds, length and batches; else 'own'."""
    free = ("seed", "total_minutes", "steps", "decay_steps", "vision_steps", "batch", "validation_batches")
    ours = {k: v for k, v in asdict(recipe).items() if k not in free}
    names = (name for name, one in RECIPES.items() if ours.items() <= asdict(one).items())
    return next(names, "own")
