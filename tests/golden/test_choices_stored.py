"""What the guard and each policy choose for made-up questions, stored: another rule shows as another setting.

Policies are drawn, not trained: networks have seeded weights, and read the tiny model's embeddings and blocks.
`PYTHONPATH=tests python tests/golden/test_choices_stored.py` writes them anew; read them before you commit them.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import stores
import torch
from torch import Tensor

import tiny_model
from tempovlm.control.guard import Guard
from tempovlm.control.learned.llm_based import LLMBasedController
from tempovlm.control.learned.networks import (
    Knob1PredictorBudget,
    Knob1PredictorBudgetLanguage,
    Knob1PredictorBudgetLanguageGlance,
    Knob2Knob3Predictor,
    SupervisedController,
)
from tempovlm.control.learned.policies import (
    LLMBasedPolicy,
    Reader,
    Stage1Policy,
    SupervisedPolicy,
    TwoStagePolicy,
)
from tempovlm.control.margin import OnlineMargin
from tempovlm.control.policies import TablePolicy, prior_accuracy
from tempovlm.control.policy import Policy, Sight
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.request import Request
from tempovlm.model.prompt import Tokenizer
from tempovlm.model.vlm import Molmo

Net = TypeVar("Net", bound=torch.nn.Module)

STORE = Path(__file__).with_name("choices.json")
SPACE, WIDTH = tiny_model.SPACE, tiny_model.CONFIG.width
COUNTS = {
    "num_tiers": len(SPACE.tiers),
    "num_top_ks": len(SPACE.top_ks),
    "num_block_counts": len(SPACE.block_counts),
}
PROFILE = tiny_model.make_profile()
SPLIT_MS = {"medium": 0.4, "high": 0.9}
BUDGETS_MS = (None, 6.0, 13.5, 16.0, 19.0, 22.0, 25.5, 28.0, 32.0, 36.0, 40.0, 60.0)
TEXTS = (
    "what does the sign say?",
    "is there a dog",
    "how many dogs are there?",
    "what is the color of the sign?",
    "stop",
    "are there many signs",
)


@dataclass(frozen=True, eq=False)
class Asked:
    """A question with its picture: vision (C, G, D), None without one, and how slow this look at it is."""

    text: str
    vision: Tensor | None
    slowness: float


def questions() -> list[Asked]:
    rng = np.random.default_rng(0)
    tokens = tiny_model.CONFIG.vision.pooled**2
    made = []
    for i, text in enumerate(TEXTS):
        vision = torch.from_numpy(rng.standard_normal((2, tokens, WIDTH)).astype(np.float32))
        made.append(Asked(text, None if i == 4 else vision, (0.8, 1.0, 2.2)[i % 3]))
    return made


def choose(guard: Guard, asked: Asked, budget_ms: float | None) -> str:
    """The setting that runs, by the calls that the engine makes, and whether it was expected to fit."""
    request = Request(images=(), question=asked.text, budget_ms=budget_ms)
    opened_ms = PROFILE.open_ms * asked.slowness
    glance = None
    if asked.vision is not None and guard.wants_glance(request, opened_ms):
        glance, opened_ms = asked.vision[:1], PROFILE.p50_prefix_ms(0) * asked.slowness
    first = guard.choose_tier(request, None if asked.vision is None else (84, 112), opened_ms, glance)
    at_tier = next(i for i, knobs in enumerate(SPACE) if knobs.tier == first.tier)
    sight = Sight(first.tier, asked.vision, 100, 12)
    choice = guard.choose_compute(request, first, sight, PROFILE.p50_prefix_ms(at_tier) * asked.slowness)
    mark = {True: "", False: ", does not fit", None: ", no bound"}[choice.feasible]
    return f"{choice.knobs}{mark}"


def drawn(net: Net, seed: int) -> Net:
    """The network with weights wide enough for its choices to differ."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            scale = 2.0 * parameter.shape[-1] ** -0.5
            parameter.copy_(torch.from_numpy(rng.standard_normal(tuple(parameter.shape)) * scale))
    for module in net.modules():
        if hasattr(module, "range_ms"):
            module.fit((10.0, 40.0))
    return net.eval().requires_grad_(False)


def policies(model: Molmo, tokenizer: Tokenizer) -> dict[str, Policy]:
    reader, tiers = Reader(model, tokenizer), {"num_tiers": len(SPACE.tiers)}
    noise = np.random.default_rng(5).normal(0, 0.05, len(SPACE))
    accuracy = {k: value + float(e) for (k, value), e in zip(prior_accuracy(SPACE).items(), noise, strict=True)}
    budget = drawn(Knob1PredictorBudget(16, **tiers), 2)
    language = drawn(Knob1PredictorBudgetLanguage(WIDTH, 16, **tiers), 1)
    glance = drawn(Knob1PredictorBudgetLanguageGlance(WIDTH, 2 * WIDTH, 16, **tiers), 7)
    second = drawn(Knob2Knob3Predictor(2 * WIDTH, WIDTH, 16, **COUNTS), 4)
    controller = drawn(LLMBasedController(WIDTH, 16, **COUNTS), 3)
    # A shorter budget token, or what it reads of the question would change nothing.
    for parameter in controller.token.parameters():
        parameter.mul_(0.1)
    return {
        "table": TablePolicy(SPACE, accuracy),
        "supervised": SupervisedPolicy(SPACE, "supervised", drawn(SupervisedController(16, **COUNTS), 5)),
        "stage 1 by budget": Stage1Policy(SPACE, "stage 1", budget, reader),
        "stage 1 by language": Stage1Policy(SPACE, "stage 1", language, reader),
        "stage 1 by glance": Stage1Policy(SPACE, "stage 1", glance, reader),
        "two-stage": TwoStagePolicy(SPACE, "two-stage", language, reader, second),
        "two-stage by glance": TwoStagePolicy(SPACE, "two-stage", glance, reader, second),
        "LLM-based": LLMBasedPolicy(SPACE, "LLM-based", controller, model, tokenizer),
    }


def guards(policy: Policy) -> dict[str, Guard]:
    """All settings on a machine as calibrated, and a part of them on one that is known to be slower."""
    everything = tuple(range(len(SPACE)))
    guard = Guard(policy, SPACE, everything, PROFILE, control_ms=0.3, second_ms=0.1, split_ms=SPLIT_MS)
    margin = OnlineMargin(step=0.1)
    margin.observe(2.0, 1.0, 1.0)
    return {"": guard, ", every other setting, slower": replace(guard, margin=margin).only(everything[1::2])}


def all_choices(folder: Path) -> dict[str, dict[str, list[str]]]:
    """By guard and budget, the choice for each question."""
    tokenizer = Tokenizer.load(tiny_model.save_folder(folder) / "tokenizer.json")
    named = {"fixed": Guard.fixed(KnobConfig(tier="medium", top_k=4, num_blocks=5), SPACE, PROFILE)}
    for name, policy in policies(tiny_model.build_model(), tokenizer).items():
        named |= {name + label: guard for label, guard in guards(policy).items()}
    asked = questions()
    return {
        name: {f"{budget_ms} ms": [choose(guard, one, budget_ms) for one in asked] for budget_ms in BUDGETS_MS}
        for name, guard in named.items()
    }


def test_choices_are_the_stored_ones(tmp_path: Path) -> None:
    found = list(stores.differences(all_choices(tmp_path), stores.read(STORE), rel=0, least=0))
    assert not found, found[:10]


def test_what_is_stored_tells_policies_apart() -> None:
    stored = stores.read(STORE)
    chosen = {name: {one for row in rows.values() for one in row} for name, rows in stored.items()}
    assert len({str(rows) for rows in stored.values()}) == len(stored)
    assert min(len(settings) for name, settings in chosen.items() if name != "fixed") >= 5
    assert any("does not fit" in one for one in chosen["table"])
    for name in ("stage 1 by language", "stage 1 by glance", "two-stage", "two-stage by glance", "LLM-based"):
        # These pairs of questions have pictures that take equally long.
        pairs = [(row[i], row[i + 3]) for row in stored[name].values() for i in (0, 2)]
        assert any(one != other for one, other in pairs), name


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        stores.write(STORE, all_choices(Path(name)))
