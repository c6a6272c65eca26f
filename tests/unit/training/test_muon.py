"""Muon against the library's own for a single matrix, and its handling of stacks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tempovlm.training.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_one_matrix_moves_as_under_the_librarys_muon(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    ours = nn.Parameter(torch.randn(shape, generator=generator))
    theirs = nn.Parameter(ours.detach().clone())
    mine = Muon([{"params": [ours], "weight_decay": 0.1}], 0.02)
    library = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        mine.step()
        library.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


def test_stacked_experts_move_as_they_would_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    stack = nn.Parameter(torch.zeros(3, 12, 20))
    singles = [nn.Parameter(torch.zeros(12, 20)) for _ in range(3)]
    together = Muon([{"params": [stack]}], 0.1)
    apart = Muon([{"params": singles}], 0.1)
    stack.grad = torch.randn(3, 12, 20, generator=generator)
    for single, gradient in zip(singles, stack.grad, strict=True):
        single.grad = gradient.clone()
    together.step()
    apart.step()
    torch.testing.assert_close(stack.detach(), torch.stack([s.detach() for s in singles]), rtol=0, atol=1e-4)


def test_a_parameter_without_a_gradient_stays() -> None:
    idle, busy = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    busy.grad = torch.eye(4)
    Muon([{"params": [idle, busy], "weight_decay": 0.5}], 0.1).step()
    assert torch.equal(idle, torch.ones(4, 4))
    assert not torch.equal(busy, torch.ones(4, 4))


def test_singular_values_come_near_one() -> None:
    matrices = torch.randn(5, 16, 48, generator=torch.Generator().manual_seed(3))
    values = torch.linalg.svdvals(orthogonalise(matrices, 5).float())
    assert values.min() > 0.4
    assert values.max() < 1.4
