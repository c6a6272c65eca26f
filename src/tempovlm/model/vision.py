"""Crops to tokens: a vision transformer of which two layers are kept, attention pooling and a projector.

Shapes: `C` crops, `P` patches of a crop, `G` pooled tokens of a crop, `D` decoder width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tempovlm.model.config import ModelConfig, VisionConfig
from tempovlm.model.layers import quick_gelu, swiglu


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
        """(C, P + 1, width) to the same shape."""
        C, T, W = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(C, T, 3, self.num_heads, W // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).reshape(C, T, W))
        return x + self.down(quick_gelu(self.up(self.mlp_norm(x))))


class VisionTransformer(nn.Module):
    """Patches to features; blocks past the last kept layer exist in a checkpoint but never run."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.keep = config.feature_blocks
        self.patch_embedding = nn.Linear(config.patch_values, config.width, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        self.positions = nn.Parameter(torch.empty(config.num_patches + 1, config.width))
        self.pre_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_blocks))

    def forward(self, patches: Tensor, live: Tensor | None = None) -> Tensor:
        """(C, P, patch values) to (C, P, feature width): the kept layers side by side, without the class token.

        Crops that are False in `live` (C,) get features of zero.
        """
        x = self.patch_embedding(patches)
        first = self.class_embedding.expand(x.shape[0], 1, -1)
        x = self.pre_norm(torch.cat((first, x), dim=1) + self.positions)
        kept = {}
        for i in range(max(self.keep) + 1):
            x = self.blocks[i](x)
            if i in self.keep:
                kept[i] = x[:, 1:]
        features = torch.cat([kept[i] for i in self.keep], dim=-1)
        return features if live is None else features * live.view(-1, 1, 1)


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
        """(C, P, features) and (C, P) shares of real pixels to (C, G, D) tokens.

        A mask of 0 is padding, of 1 is picture, anything else is partly padded.
        """
        empty = (masks == 0).to(features.dtype).unsqueeze(-1)
        partial = ((masks < 1) & (masks != 0)).to(features.dtype).unsqueeze(-1)
        x = features + self.pad_embedding[0] * empty + self.pad_embedding[1] * partial
        C, _, W = x.shape
        s, p = self.side, self.pool
        windows = x.view(C, s, p, s, p, W).permute(0, 1, 3, 2, 4, 5).reshape(C * s * s, p * p, W)
        pooled = self._attend(windows).view(C, s * s, -1)
        return self.down(swiglu(self.gate_up(pooled)))

    def _attend(self, windows: Tensor) -> Tensor:
        """Mean-query attention within each window: (windows, p², features) to (windows, width)."""
        n, keys, _ = windows.shape
        q = self.query(windows.mean(dim=1)).view(n, 1, self.num_heads, -1)
        k, v = self.key_value(windows).view(n, keys, 2, self.num_heads, -1).unbind(2)
        scores = (q * k).sum(-1, dtype=torch.float32) * q.shape[-1] ** -0.5  # n, keys, heads
        weights = scores.softmax(dim=1).to(v.dtype).unsqueeze(-1)
        return self.out((weights * v).sum(1).flatten(1))
