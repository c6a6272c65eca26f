"""Muon: momentum whose matrices are orthogonalised before they are applied (Jordan et al. 2024).

The library's own `torch.optim.Muon` takes one matrix at a time; a model of many small ones, including stacked
experts, would spend its step starting kernels. Here all matrices of one shape go through each product together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Quintic that drives singular values towards one in few steps (Jordan et al. 2024)."""

ADAM_RMS = 0.2
"""Root mean square of a typical AdamW update, which is matched, so that both share one rate (Liu et al. 2025,
arXiv 2502.16982)."""


class Muon(torch.optim.Optimizer):
    """Muon for parameters of (..., rows, columns): each matrix of a stack counts separately.

    Decoupled weight decay as in AdamW; `lr` may be changed between steps, one for each group.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], lr: float, momentum: float = 0.95, steps: int = 5
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "steps": steps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply the gradients; a parameter without one is left unchanged."""
        del closure
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append(parameter)
            for members in shapes.values():
                self._update(members, group)

    def _update(self, members: list[Tensor], group: dict[str, Any]) -> None:
        """Update the parameters of one shape."""
        gradients = [p.grad for p in members if p.grad is not None]
        for parameter in members:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        moving = [self.state[p]["momentum"] for p in members]
        torch._foreach_lerp_(moving, gradients, 1 - group["momentum"])
        ahead = torch.stack(torch._foreach_lerp(gradients, moving, group["momentum"]))
        rows, columns = ahead.shape[-2:]
        turned = orthogonalise(ahead.view(-1, rows, columns), group["steps"]).view_as(ahead)
        rate = group["lr"] * ADAM_RMS * max(rows, columns) ** 0.5
        torch._foreach_mul_(members, 1 - group["lr"] * group["weight_decay"])
        # Laid out as the parameters are: otherwise each would be added by a kernel of its own.
        moves = turned.to(members[0].dtype, memory_format=torch.contiguous_format)
        torch._foreach_add_(members, moves.unbind(), alpha=-rate)


def orthogonalise(matrices: Tensor, steps: int) -> Tensor:
    """Return (n, rows, columns) matrices with singular values near one (Newton-Schulz iteration), in bfloat16."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
