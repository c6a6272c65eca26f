from __future__ import annotations

import pytest
import torch

from tempovlm.core.request import Request
from tempovlm.engine.sampling import greedy, nucleus, sampler_for
from tempovlm.model.decoder import BROKEN


def test_greedy_takes_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert sampler_for(Request(images=(), question="q"), torch.device("cpu")) is greedy
    assert greedy(logits).tolist() == [1, 0]


@pytest.mark.parametrize("wrong", [[torch.nan], [torch.inf], [torch.nan, torch.inf], [-torch.inf] * 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_token_is_taken_from_what_is_not_a_number(wrong: list[float], temperature: float) -> None:
    sample = sampler_for(Request(images=(), question="q", temperature=temperature), torch.device("cpu"))
    logits = torch.tensor([[0.0, 9.0, 1.0, -torch.inf]]).repeat(len(wrong) + 1, 1)
    for row in range(1, len(logits)):
        logits[row, : len(wrong)] = torch.tensor(wrong)
        logits[row] = logits[row].roll(row)
    tokens = sample(logits).tolist()
    assert tokens[1:] == [BROKEN] * len(wrong)
    assert tokens[0] in (0, 1, 2)


@pytest.mark.parametrize("temperature", [3.5e38, 1e300])
def test_the_highest_temperatures_draw_any_token_that_may_be_said(temperature: float) -> None:
    sample = sampler_for(Request(images=(), question="q", temperature=temperature, seed=1), torch.device("cpu"))
    logits = torch.tensor([[0.0, -torch.inf, 9.0, -5.0]])  # an open answer forbids tokens
    assert {int(sample(logits)) for _ in range(60)} == {0, 2, 3}


@pytest.mark.parametrize("temperature", [1e-300, 1e-42, 1e-12])
def test_the_lowest_temperatures_draw_the_likeliest(temperature: float) -> None:
    sample = sampler_for(Request(images=(), question="q", temperature=temperature), torch.device("cpu"))
    assert sample(torch.tensor([[0.0, 200.0, 1.0], [-3.0, -900.0, -2.9]])).tolist() == [1, 2]


def test_nucleus_keeps_the_fewest_that_reach_the_mass() -> None:
    probabilities = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    assert nucleus(probabilities, 0.5).nonzero()[:, 1].tolist() == [1]
    assert nucleus(probabilities, 0.6).nonzero()[:, 1].tolist() == [1, 3]
    assert torch.equal(nucleus(probabilities, 1.0), probabilities)


def test_samples_follow_the_distribution() -> None:
    request = Request(images=(), question="q", temperature=0.5, top_p=0.95, seed=3)
    logits = torch.tensor([[0.7, 0.2, 0.1]]).log() * 0.5
    sample = sampler_for(request, torch.device("cpu"))
    counts = torch.bincount(torch.cat([sample(logits) for _ in range(2000)]), minlength=3) / 2000
    torch.testing.assert_close(counts, torch.tensor([0.7, 0.2, 0.1]), atol=0.04, rtol=0)


@pytest.mark.parametrize("top_p", [1e-300, 1e-46])
def test_the_smallest_nucleus_is_the_likeliest_token(top_p: float) -> None:
    request = Request(images=(), question="q", temperature=1.5, top_p=top_p)
    assert sampler_for(request, torch.device("cpu"))(torch.tensor([[0.0, 2.0, 1.0]])).tolist() == [1]
