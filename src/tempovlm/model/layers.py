"""Small parts shared by attention, experts and the vision side. Shapes: `B` batch, `T` tokens, `D` width."""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HAS_TRITON = find_spec("triton") is not None
"""Whether the kernels can be imported."""


def has_kernels(x: Tensor, weight: Tensor) -> bool:
    """Whether `kernels.prefill` can run: on CUDA in bfloat16, without gradients."""
    is_fit = x.is_cuda and x.dtype == weight.dtype == torch.bfloat16
    return HAS_TRITON and is_fit and not (x.requires_grad or (weight.requires_grad and torch.is_grad_enabled()))


class RMSNorm(nn.Module):
    """Root-mean-square norm with a weight and no bias (Zhang and Sennrich 2019, arXiv 1910.07467).

    Computed in float32 and cast back before the weight is applied, as the published model does.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; keeps shape and type."""
        if x.is_cuda and (x.dtype == torch.float32 or x.requires_grad):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        if has_kernels(x, self.weight):
            from tempovlm.model.kernels import prefill

            return prefill.norm(x, self.weight, self.eps)
        # On a CPU the library's norm is a chain of a dozen operations; these five take half the time.
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True).add_(self.eps))
        return (x32 * scale).to(x.dtype) * self.weight


class Rotary(nn.Module):
    """Rotary position embedding, rotate-half form (Su et al. 2021, arXiv 2104.09864); tables stay float32."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_width: int, theta: float, max_positions: int) -> None:
        super().__init__()
        self.head_width, self.theta = head_width, theta
        self.register_buffer("cos", torch.empty(max_positions, head_width), persistent=False)
        self.register_buffer("sin", torch.empty(max_positions, head_width), persistent=False)
        self.reset()

    def reset(self) -> None:
        """Fill the tables in float32 in place: after an allocation without values, or a cast."""
        device = self.cos.device
        if device.type == "meta":  # meta tensors have no values, and torch takes 0.7 s to load what it needs to
            # pretend
            return
        exponents = torch.arange(0, self.head_width, 2, device=device).float() / self.head_width
        angles = torch.outer(torch.arange(self.cos.shape[0], device=device).float(), 1.0 / self.theta**exponents)
        angles = torch.cat((angles, angles), dim=-1)
        self.cos, self.sin = angles.cos(), angles.sin()

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, float32, (B, T, 1, head width), for positions (B, T)."""
        return self.cos[positions].unsqueeze(2), self.sin[positions].unsqueeze(2)


def norm_rotate(norm: RMSNorm, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Normalise (B, T, D), then apply the rotary embedding to its heads: (B, T, heads, head width)."""
    heads = (*x.shape[:2], -1, cos.shape[-1])
    if x.is_cuda and x.requires_grad:
        from tempovlm.model.kernels import training

        return training.norm_rotate(x, norm.weight, cos, sin, norm.eps).view(heads)
    if has_kernels(x, norm.weight):
        from tempovlm.model.kernels import prefill

        return prefill.norm_rotate(x, norm.weight, cos, sin, norm.eps).view(heads)
    return rotate(norm(x).view(heads), cos, sin)


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's activation: x · sigmoid(1.702 x) (Radford et al. 2021)."""
    if x.is_cuda and x.requires_grad:
        from tempovlm.model.kernels import training

        return training.quick_gelu(x)
    return x * torch.sigmoid(1.702 * x)


def swiglu(gate_up: Tensor) -> Tensor:
    """SiLU of the first half of the last dimension times the second half (Shazeer 2020, arXiv 2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gated_swiglu(gate_up: Tensor, weights: Tensor) -> Tensor:
    """Return SwiGLU of every expert times its weight: (N, E·2F) and (N, E) to (N, E·F)."""
    if gate_up.is_cuda:
        from tempovlm.model.kernels import training

        return training.gated_swiglu(gate_up, weights)
    hidden = swiglu(gate_up.unflatten(-1, (weights.shape[-1], -1)))
    return (hidden * weights.unsqueeze(-1)).flatten(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply a rotary embedding to (B, T, heads, head width) in float32; returns the type of `x`."""
    x32 = x.float()
    first, second = x32.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x32 * cos + turned * sin).to(x.dtype)
