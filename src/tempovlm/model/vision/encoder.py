"""Crops to tokens: a vision transformer of which two layers are kept, attention pooling and a projector.

On CUDA without gradients the parts between the matrix products are kernels of `kernels/vision.py`, which round
where the plain modules do or less often; everywhere else, and without Triton, the plain modules run.

Shapes: `C` crops, `P` patches of a crop, `G` pooled tokens of a crop, `D` decoder width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempovlm.model.config import ModelConfig, VisionConfig
from tempovlm.model.layers import quick_gelu, swiglu

ALIGNMENT = 8
"""Values of two bytes in the 16 bytes that a CUDA product loads at once."""

FEW_ROWS, PARTS = 1024, 2
"""Long products with up to this many rows are split along the summed dimension: too few programs otherwise."""


@cache
def _kernels() -> ModuleType | None:
    try:
        from tempovlm.model.kernels import vision
    except ImportError:
        return None
    return vision


def kernels_for(x: Tensor) -> ModuleType | None:
    """Return the kernels that may replace plain operations on `x`; None if the plain ones must run."""
    return _kernels() if x.is_cuda and not torch.is_grad_enabled() else None


def only_live(features: Tensor, live: Tensor | None) -> Tensor:
    """Return features (C, P, F) with zeros for the crops that are False in `live` (C,)."""
    return features if live is None else features * live.view(-1, 1, 1)


class VisionBlock(nn.Module):
    """Pre-norm transformer block with biases and quick-GELU, as in CLIP (Radford et al. 2021)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.attention_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.up = nn.Linear(width, config.mlp_width)
        self.down = nn.Linear(config.mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output (C, P + 1, width)."""
        x = x + self.attend(self.attention_norm(x))
        return x + self.down(quick_gelu(self.up(self.mlp_norm(x))))

    def attend(self, x: Tensor) -> Tensor:
        """Attend within each crop of normalised (C, P + 1, width); same shape out."""
        return self.out(self.mix(x))

    def mix(self, x: Tensor) -> Tensor:
        """Return the values that every patch gathers: (C, P + 1, width)."""
        C, T, W = x.shape
        qkv = self.qkv(x)
        if x.is_cuda and x.requires_grad:
            from tempovlm.model.kernels import attention

            if attention.fits(W, self.num_heads):
                return attention.crop_attention(qkv, self.num_heads)
        q, k, v = qkv.view(C, T, 3, self.num_heads, W // self.num_heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return y.transpose(1, 2).reshape(C, T, W)


class VisionTransformer(nn.Module):
    """From patches to features; blocks past the last kept layer exist in a checkpoint but never run."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.keep = config.feature_blocks
        self.patch_embedding = nn.Linear(config.patch_values, config.width, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        self.positions = nn.Parameter(torch.empty(config.num_patches + 1, config.width))
        self.pre_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_blocks))

    def forward(
        self, patches: Tensor, live: Tensor | None = None, tick: Callable[[], None] | None = None
    ) -> Tensor:
        """(C, P, patch values) to (C, P, feature width): the kept layers side by side, without the class token.

        Crops that are False in `live` (C,) get features of zero. `tick` is called before each block of the plain
        modules, and may raise.
        """
        kernels = kernels_for(patches)
        x = self.patch_embedding(patches) if kernels is None else self._embed_aligned(patches)
        first = self.class_embedding.expand(x.shape[0], 1, -1)
        x = self.pre_norm(torch.cat((first, x), dim=1) + self.positions)
        if kernels is not None:
            return only_live(self.fused_features(x, kernels), live)
        kept = self.layers(x, tick)
        return only_live(torch.cat([kept[i][:, 1:] for i in self.keep], dim=-1), live)

    def _embed_aligned(self, patches: Tensor) -> Tensor:
        """Apply the patch embedding padded to a multiple of eight values; otherwise CUDA's products are slow."""
        lacking = -patches.shape[-1] % ALIGNMENT
        if not lacking:
            return self.patch_embedding(patches)
        return F.linear(F.pad(patches, (0, lacking)), F.pad(self.patch_embedding.weight, (0, lacking)))

    def layers(self, x: Tensor, tick: Callable[[], None] | None = None) -> dict[int, Tensor]:
        """Outputs (C, P + 1, width) of the kept blocks, by block."""
        kept = {}
        for i in range(max(self.keep) + 1):
            if tick is not None:
                tick()
            x = self.blocks[i](x)
            if i in self.keep:
                kept[i] = x
        return kept

    def fused_features(self, x: Tensor, kernels: ModuleType) -> Tensor:
        """Return features (C, P, feature width) of (C, P + 1, width), which is changed: 6 or 7 launches a block.

        A block's output is added by the product that makes it, or by the norm that reads it if that product is
        made in parts. The biases of those products, which no such product can add, are left out of the residual
        stream and added where it is read: by norms, and at the end.
        """
        C, T, W = x.shape
        blocks = [block for block in self.blocks if isinstance(block, VisionBlock)][: max(self.keep) + 1]
        left_out = x.new_zeros(2 * len(blocks) + 1, W, dtype=torch.float32)
        features, rows, bias = x.new_empty(C, T - 1, len(self.keep) * W), x.view(-1, W), left_out[0]
        parts: Tensor | None = None
        for i, block in enumerate(blocks):
            mixed = block.mix(kernels.biased_norm(x, left_out, 2 * i, bias, block.attention_norm, parts))
            rows.addmm_(mixed.view(-1, W), block.out.weight.t())
            y = kernels.biased_norm(rows, left_out, 2 * i + 1, block.out.bias, block.mlp_norm)
            hidden, bias, parts = kernels.product_gelu(y, block.up), block.down.bias, None
            if len(rows) <= FEW_ROWS:
                parts = product_parts(hidden, block.down.weight)
            else:
                rows.addmm_(hidden, block.down.weight.t())
            for place in (place for place, kept in enumerate(self.keep) if kept == i):
                kernels.keep(x, left_out[2 * i + 2], bias, features, place, parts)
        return features


def product_parts(x: Tensor, weight: Tensor) -> Tensor:
    """Return summands (PARTS, N, D) of the product of (N, F) with (D, F): each over a part of F."""
    x, weight = (values.unflatten(1, (PARTS, -1)) for values in (x, weight))
    return torch.bmm(x.transpose(0, 1), weight.permute(1, 2, 0))


class Projector(nn.Module):
    """Padding embedding, 2 × 2 attention pooling with a mean query, and a SwiGLU projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        vision = config.vision
        features, width = vision.feature_width, vision.width
        self.side, self.pool, self.num_heads = vision.pooled, vision.pool, vision.num_heads
        self.pad_embedding = nn.Parameter(torch.zeros(2, features))
        self.query = nn.Linear(features, width)
        self.key_value = nn.Linear(features, 2 * width)
        self.out = nn.Linear(width, width)
        self.gate_up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(width, config.width, bias=False)

    def forward(self, features: Tensor, masks: Tensor) -> Tensor:
        """Return tokens (C, G, D) of features (C, P, features) and shares of real pixels (C, P).

        A mask of 0 is padding, of 1 is picture, anything else is partly padded.
        """
        kernels = kernels_for(features)
        if kernels is not None:
            return self.fused(features, masks, kernels)
        empty = (masks == 0).to(features.dtype).unsqueeze(-1)
        partial = ((masks < 1) & (masks != 0)).to(features.dtype).unsqueeze(-1)
        x = features + self.pad_embedding[0] * empty + self.pad_embedding[1] * partial
        C, _, W = x.shape
        s, p = self.side, self.pool
        windows = x.view(C, s, p, s, p, W).permute(0, 1, 3, 2, 4, 5).reshape(C * s * s, p * p, W)
        pooled = self._attend(windows).view(C, s * s, -1)
        return self.down(swiglu(self.gate_up(pooled)))

    def fused(self, features: Tensor, masks: Tensor, kernels: ModuleType) -> Tensor:
        """Like `forward`, with padding, windows and means in one kernel and attention in another."""
        windows, means = kernels.pad_windows(features, masks, self.pad_embedding, self.side, self.pool)
        pooled = self.out(kernels.pool(self.query(means), self.key_value(windows), self.num_heads))
        return self.down(swiglu(self.gate_up(pooled))).view(len(features), self.side**2, -1)

    def _attend(self, windows: Tensor) -> Tensor:
        """Attend with the mean as query within each window: (windows, p², features) to (windows, width)."""
        n, keys, _ = windows.shape
        q = self.query(windows.mean(dim=1)).view(n, 1, self.num_heads, -1)
        k, v = self.key_value(windows).view(n, keys, 2, self.num_heads, -1).unbind(2)
        scores = (q * k).sum(-1, dtype=torch.float32) * q.shape[-1] ** -0.5  # n, keys, heads
        weights = scores.softmax(dim=1).to(v.dtype).unsqueeze(-1)
        return self.out((weights * v).sum(1).flatten(1))
