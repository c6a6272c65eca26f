from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny_model
from tempovlm.control.learned.llm_based import LLMBasedController, pad_tokens
from tempovlm.core.plan import Plan, Step
from tempovlm.model.prompt import IMAGE_PATCH, Tokenizer, glance_places, glance_tokens
from tempovlm.model.vlm import Molmo

QUESTIONS = ("what does the sign say?", "how many dog are there there there?")
BUDGETS = torch.tensor([20.0, 400.0])


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Tokenizer:
    return Tokenizer.load(tiny_folder / "tokenizer.json")


@pytest.fixture(scope="module")
def model() -> Molmo:
    return tiny_model.build_model()


@pytest.fixture
def controller() -> LLMBasedController:
    torch.manual_seed(0)
    return LLMBasedController(tiny_model.CONFIG.width, 16).eval()


def inputs(tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Glances (2, G, D), padded streams and their lengths."""
    config = tiny_model.CONFIG
    streams = [glance_tokens(question, "vqa2", config, tokenizer) for question in QUESTIONS]
    tokens, lengths = pad_tokens(streams)
    glance = torch.randn(2, config.vision.pooled**2, config.width, generator=torch.Generator().manual_seed(1))
    return glance, tokens, lengths


def test_the_glance_stands_where_the_model_expects_it(tokenizer: Tokenizer) -> None:
    tokens = glance_tokens(QUESTIONS[0], "vqa2", tiny_model.CONFIG, tokenizer)
    places = glance_places(tiny_model.CONFIG)
    assert (tokens[places] == tokenizer.ids[IMAGE_PATCH]).all()
    assert (tokens == tokenizer.ids[IMAGE_PATCH]).sum() == len(places)
    assert tokens[0] == tokenizer.end
    assert tokenizer.decode(tokens[int(places[-1]) + 3 :].tolist()).startswith("user")


def test_shapes_follow_the_knob_space(model: Molmo, controller: LLMBasedController, tokenizer: Tokenizer) -> None:
    found = controller(model, *inputs(tokenizer), BUDGETS)
    assert [tuple(logits.shape) for logits in found] == [(2, 3), (2, 5), (2, 5)]
    other = LLMBasedController(**{**controller.sizes, "num_block_counts": 4})
    assert other(model, *inputs(tokenizer), BUDGETS).num_blocks.shape == (2, 4)
    assert other.sizes == {**controller.sizes, "num_block_counts": 4}


def test_padding_changes_nothing(model: Molmo, controller: LLMBasedController, tokenizer: Tokenizer) -> None:
    glance, tokens, lengths = inputs(tokenizer)
    together = controller(model, glance, tokens, lengths, BUDGETS)
    for i in range(2):
        one = slice(i, i + 1)
        alone = controller(model, glance[one], tokens[one, : lengths[i]], lengths[one], BUDGETS[one])
        for ours, theirs in zip(alone, together, strict=True):
            torch.testing.assert_close(ours, theirs[one], atol=1e-5, rtol=1e-4)


def test_what_was_read_serves_every_budget(
    model: Molmo, controller: LLMBasedController, tokenizer: Tokenizer
) -> None:
    reading = controller.read(model, *inputs(tokenizer))
    assert not reading.keys.requires_grad
    wide = controller.decide(model, reading.take(torch.tensor([1])), BUDGETS[1:])
    tight = controller.decide(model, reading.take(torch.tensor([1])), BUDGETS[:1])
    torch.testing.assert_close(wide.tier, controller(model, *inputs(tokenizer), BUDGETS).tier[1:])
    assert not torch.allclose(wide.tier, tight.tier)


def test_the_budget_token_sees_what_the_models_own_blocks_make_of_the_stream(
    model: Molmo, controller: LLMBasedController, tokenizer: Tokenizer
) -> None:
    """The last token's state is that of one pass of the decoder over the whole stream."""
    glance, tokens, lengths = inputs(tokenizer)
    glance, tokens, lengths = glance[:1], tokens[:1, : lengths[0]], lengths[:1]
    seen: list[torch.Tensor] = []
    controller.norm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        controller(model, glance, tokens, lengths, BUDGETS[:1])
        x = model.decoder.embed(tokens).index_add(1, glance_places(model.config), glance)
        x = torch.cat((x, controller.token(controller.budget(BUDGETS[:1])).unsqueeze(1)), dim=1)
        top_k = model.config.top_k
        plan = Plan(tiny_model.SPACE.native, (Step(0, top_k), Step(1, top_k)))
        whole = model.decoder(x, torch.arange(x.shape[1]).unsqueeze(0), plan)
    torch.testing.assert_close(seen[0], whole[:, -1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("change", ["glance", "question"])
def test_it_looks_at_picture_and_question(
    model: Molmo, controller: LLMBasedController, tokenizer: Tokenizer, change: str
) -> None:
    glance, tokens, lengths = inputs(tokenizer)
    before = controller(model, glance, tokens, lengths, BUDGETS)
    if change == "glance":
        glance = glance.flip(0)
    else:
        tokens = tokens.clone()
        tokens[:, -12] = 7
    after = controller(model, glance, tokens, lengths, BUDGETS)
    assert not torch.allclose(before.tier[1], after.tier[1])


def test_gradients_reach_every_weight_and_none_of_the_models(
    model: Molmo, controller: LLMBasedController, tokenizer: Tokenizer
) -> None:
    trained = controller(model, *inputs(tokenizer), BUDGETS)
    with torch.no_grad():
        served = controller(model, *inputs(tokenizer), BUDGETS)
    for ours, theirs in zip(trained, served, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    sum((logits**2).sum() for logits in trained).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in controller.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_the_model_is_no_part_of_it(controller: LLMBasedController) -> None:
    assert sum(p.numel() for p in controller.parameters()) < 20_000


def test_without_pictures(model: Molmo, controller: LLMBasedController, tokenizer: Tokenizer) -> None:
    _, tokens, lengths = inputs(tokenizer)
    assert torch.isfinite(controller(model, None, tokens, lengths, BUDGETS).tier).all()
