"""One token through the decoder at batch 1, in six kernels a block, each weight read once.

At batch 1 a step is limited by reading the weights, and any idle time between kernels is
lost. So work is organised by output: a program owns a few rows of one product, reads them once and keeps sums in
float32; norms are folded into the product that follows; the residual stream stays in float32. A block is

1. norm and q, k, v; 2. norm and rotation of q and k, cache entry, attention split over the context; 3. output
projection and residual; 4. norm, router, softmax and choice of experts; 5. gate and up rows of the chosen experts,
SiLU; 6. their down rows, weighted sum and residual.

If a result is split over programs, the last program to arrive adds the parts up (flash-decoding, Dao et al.
2023, with a ticket instead of a second kernel). On GPUs that can, a kernel is started before the previous one
has ended (`kernels/products.py` says how that stays right). Position and token live on the device, so that one
captured graph serves every position. Weights may be of one byte a value (`model/quantised.py`): a row's scale is
applied to its sum, or to its products where rows of several experts are summed. The only sampling here is
the choice of the likeliest token.

Shapes: `D` width, `H` heads, `W` head width, `E` experts, `K` top-k, `F` expert width, `V` vocabulary, `T`
capacity of the cache, `R` rows of a program, `C` columns that it reads at a time, `N` cached tokens at a time,
`S` splits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tempovlm.core.plan import Plan
from tempovlm.model.cache import KVCache
from tempovlm.model.config import ModelConfig
from tempovlm.model.decoder import BROKEN
from tempovlm.model.kernels import products
from tempovlm.model.kernels.device import on_device
from tempovlm.model.kernels.tiles import Tile, Tiling
from tempovlm.model.layers import RMSNorm, Rotary
from tempovlm.model.quantised import AnyAttention, AnyBlock, AnyDecoder, AnyMoE, Weight, parts

PICK_COLUMNS = 2048
"""Logits that one program searches for the likeliest token."""

_BROKEN = tl.constexpr(BROKEN)

EARLY_CAPABILITY = (9, 0)
"""CUDA compute capability from which a kernel can start before the previous one has ended."""


@triton.jit
def _embed(token_ptr, table_ptr, x_ptr, D: tl.constexpr, C: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:  # everything that a later kernel reads before it waits exists once this one has waited
        gdc_wait()
        gdc_launch_dependents()
    at = tl.program_id(0) * C + tl.arange(0, C)
    token = tl.maximum(tl.load(token_ptr).to(tl.int64), 0)  # a step may follow one whose logits were no numbers
    row = tl.load(table_ptr + token * D + at, mask=at < D, other=0.0)
    tl.store(x_ptr + at, row.to(tl.float32), mask=at < D)


@triton.jit
def _rotated(x_ptr, norm_ptr, first, place, inside, scale, cos, sin, W: tl.constexpr):
    """Return one head of a vector, normalised with `scale` and rotated (rotate-half form)."""
    partner = tl.where(place < W // 2, place + W // 2, place - W // 2)
    sign = tl.where(place < W // 2, -1.0, 1.0)
    x = tl.load(x_ptr + first + place, mask=inside, other=0.0)
    x *= tl.load(norm_ptr + first + place, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x_ptr + first + partner, mask=inside, other=0.0)
    other *= tl.load(norm_ptr + first + partner, mask=inside, other=0.0).to(tl.float32)
    return (x * cos + sign * other * sin) * scale


@triton.jit
def _entries(keys_ptr, values_ptr, cached, n, position, inside, W: tl.constexpr):
    """Load keys and values (N, W) of earlier tokens `n`, past this processor's own cache: a step changes them."""
    live = (n < position)[:, None] & inside[None, :]
    at = cached[None, :] + n[:, None] * W
    key = tl.load(keys_ptr + at, mask=live, other=0.0, cache_modifier=".cg")
    return key, tl.load(values_ptr + at, mask=live, other=0.0, cache_modifier=".cg")


@triton.jit
def _attend(
    qkv_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, position_ptr, keys_ptr, values_ptr,
    parts_ptr, sums_ptr, tickets_ptr, out_ptr, capacity, eps, root,
    D: tl.constexpr, W: tl.constexpr, D_PAD: tl.constexpr, W_PAD: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
    head, split = tl.program_id(0), tl.program_id(1)
    position = tl.load(position_ptr, cache_modifier=".cg")
    i, place = tl.arange(0, D_PAD), tl.arange(0, W_PAD)
    inside = place < W
    first = head * W
    cached = head.to(tl.int64) * capacity * W + place
    n = split * N + tl.arange(0, N)
    key, value = _entries(keys_ptr, values_ptr, cached, n, position, inside, W)
    if EARLY:  # entries of earlier tokens were there before the step began
        gdc_wait()
    q_all = tl.load(qkv_ptr + i, mask=i < D, other=0.0)
    k_all = tl.load(qkv_ptr + D + i, mask=i < D, other=0.0)
    cos = tl.load(cos_ptr + position * W + place, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + position * W + place, mask=inside, other=0.0)
    q_scale = tl.rsqrt(tl.sum(q_all * q_all, axis=0) / D + eps)
    k_scale = tl.rsqrt(tl.sum(k_all * k_all, axis=0) / D + eps)
    q = _rotated(qkv_ptr, q_norm_ptr, first, place, inside, q_scale * root, cos, sin, W)
    k = _rotated(qkv_ptr + D, k_norm_ptr, first, place, inside, k_scale, cos, sin, W)
    v = tl.load(qkv_ptr + 2 * D + first + place, mask=inside, other=0.0)

    # No program's range of the cache includes the new token: the last split writes it and starts its sums with it.
    is_last = split == S - 1
    entry = (head.to(tl.int64) * capacity + position) * W + place
    if is_last:
        tl.store(keys_ptr + entry, k.to(keys_ptr.dtype.element_ty), mask=inside)
        tl.store(values_ptr + entry, v.to(values_ptr.dtype.element_ty), mask=inside)
    top = tl.where(is_last, tl.sum(q * k, axis=0), float("-inf"))
    mass = tl.where(is_last, 1.0, 0.0)
    mixed = tl.where(is_last, v, 0.0)
    for _ in range(split * N, position, S * N):
        next_n = n + S * N
        next_key, next_value = _entries(keys_ptr, values_ptr, cached, next_n, position, inside, W)
        scores = tl.where(n < position, tl.sum(key.to(tl.float32) * q[None, :], axis=1), float("-inf"))
        highest = tl.maximum(top, tl.max(scores, axis=0))
        weights = tl.exp(scores - highest)
        shrink = tl.exp(top - highest)
        mass = mass * shrink + tl.sum(weights, axis=0)
        mixed = mixed * shrink + tl.sum(weights[:, None] * value.to(tl.float32), axis=0)
        top, n, key, value = highest, next_n, next_key, next_value

    part = head * S + split
    tl.store(parts_ptr + part * W + place, mixed, mask=inside)
    tl.store(sums_ptr + part * 2, top)
    tl.store(sums_ptr + part * 2 + 1, mass)
    tl.debug_barrier()
    if tl.atomic_add(tickets_ptr + head, 1) == S - 1:
        every = head * S + tl.arange(0, S)
        # Other programs wrote these: read past this processor's own cache.
        tops = tl.load(sums_ptr + every * 2, cache_modifier=".cg")
        masses = tl.load(sums_ptr + every * 2 + 1, cache_modifier=".cg")
        mixes = tl.load(
            parts_ptr + every[:, None] * W + place[None, :],
            mask=(every >= 0)[:, None] & inside[None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        shares = tl.exp(tops - tl.max(tops, axis=0))
        out = tl.sum(mixes * shares[:, None], axis=0) / tl.sum(masses * shares, axis=0)
        tl.store(out_ptr + first + place, out, mask=inside)
        tl.store(tickets_ptr + head, 0)


@triton.jit
def _pick(
    logits_ptr, limit_ptr, best_ptr, where_ptr, ticket_ptr, token_ptr, position_ptr, V, parts,
    C: tl.constexpr, P_PAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_wait()
    at = tl.program_id(0) * C + tl.arange(0, C)
    values = tl.load(logits_ptr + at, mask=at < V, other=float("-inf"))
    if limit_ptr is not None:
        values += tl.load(limit_ptr + at, mask=at < V, other=0.0)
    # A maximum ignores NaN, so a NaN logit counts as infinite.
    best = tl.max(tl.where(values == values, values, float("inf")), axis=0)
    tl.store(best_ptr + tl.program_id(0), best)
    tl.store(where_ptr + tl.program_id(0), tl.min(tl.where(values == best, at, V - 1), axis=0))
    tl.debug_barrier()
    if tl.atomic_add(ticket_ptr, 1) == parts - 1:
        p = tl.arange(0, P_PAD)
        bests = tl.load(best_ptr + p, mask=p < parts, other=float("-inf"), cache_modifier=".cg")
        places = tl.load(where_ptr + p, mask=p < parts, other=2147483647, cache_modifier=".cg")
        top = tl.max(bests, axis=0)
        token = tl.min(tl.where(bests == top, places, V - 1), axis=0)
        is_sound = (top > float("-inf")) & (top < float("inf"))
        tl.store(token_ptr, tl.where(is_sound, token, _BROKEN).to(tl.int64))
        tl.store(position_ptr, tl.load(position_ptr) + 1)
        tl.store(ticket_ptr, 0)


def _floats(*shape: int, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device=device)


@dataclass(frozen=True, slots=True)
class StepBuffers:
    """Inputs and outputs of a step besides weights and cache; addresses never change.

    Attributes:
        token: (1,) the last token, int64, replaced by the next one. position: (1,) its place, int32, incremented.
        x: (D,) the residual stream. logits: (1, V), float32. top_k: experts for which there is room.
        tickets: (H + 2,) arrival counters of the heads, of the choice of experts and of that of the token; zero
            between steps.
        limit: (1, V) added to the logits before a token is chosen; None if never needed.
        early: whether the kernels of a step start before the previous one has ended.
    """

    token: Tensor
    position: Tensor
    x: Tensor
    qkv: Tensor
    parts: Tensor
    sums: Tensor
    tickets: Tensor
    mixed: Tensor
    router: Tensor
    hidden: Tensor
    chosen: Tensor
    shares: Tensor
    logits: Tensor
    best: Tensor
    where: Tensor
    limit: Tensor | None = None
    tiling: Tiling = field(default_factory=Tiling)
    early: bool = False

    @property
    def device(self) -> torch.device:
        """Device of the buffers."""
        return self.x.device

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        top_k: int,
        device: torch.device,
        tiling: Tiling | None = None,
        *,
        is_limited: bool = False,
    ) -> StepBuffers:
        """Allocate buffers for plans of at most `top_k` experts a token."""
        tiling = tiling or Tiling()
        D, H, V = config.width, config.num_heads, config.embedding_size
        parts = triton.cdiv(V, PICK_COLUMNS)

        def integers(count: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=device)

        return cls(
            token=integers(1, torch.int64),
            position=integers(1),
            x=_floats(D, device=device),
            qkv=_floats(3 * D, device=device),
            parts=_floats(H, tiling.splits, config.head_width, device=device),
            sums=_floats(H, tiling.splits, 2, device=device),
            tickets=integers(H + 2),
            mixed=_floats(D, device=device),
            router=_floats(config.num_experts, device=device),
            hidden=_floats(top_k, config.expert_width, device=device),
            chosen=integers(top_k),
            shares=_floats(top_k, device=device),
            logits=_floats(1, V, device=device),
            best=_floats(parts, device=device),
            where=integers(parts),
            limit=_floats(1, V, device=device) if is_limited else None,
            tiling=tiling,
            early=device.type == "cuda" and torch.cuda.get_device_capability(device) >= EARLY_CAPABILITY,
        )


def _launch(warps: int, early: bool) -> dict[str, Any]:
    """Return launch options of a kernel; the interpreter has no early start."""
    return {"num_warps": warps, "EARLY": early} | ({"launch_pdl": True} if early else {})


@on_device
def norm_matvec(x: Tensor, norm: RMSNorm, weight: Weight, out: Tensor, tile: Tile, *, early: bool = False) -> None:
    """Write weight (rows, D) · norm(x) to `out`; `x` and `out` are float32 vectors."""
    rows, D = weight.shape
    columns = min(tile.columns, triton.next_power_of_2(D))
    products.norm_matvec[(triton.cdiv(rows, tile.rows),)](
        x, norm.weight, *parts(weight), out, rows, norm.eps, D, tile.rows, columns, **_launch(tile.warps, early)
    )


@on_device
def attend(layer: AnyAttention, rotary: Rotary, keys: Tensor, values: Tensor, on: StepBuffers) -> None:
    """Add this token's key and value to the (H, T, W) cache entries and write attention over all to `on.mixed`."""
    H, T, W = keys.shape
    D, tiling = H * W, on.tiling
    _attend[(H, tiling.splits)](
        on.qkv, layer.q_norm.weight, layer.k_norm.weight, rotary.cos, rotary.sin, on.position, keys, values,
        on.parts, on.sums, on.tickets, on.mixed, T, layer.q_norm.eps, W**-0.5,
        D, W, triton.next_power_of_2(D), triton.next_power_of_2(W), tiling.tokens, tiling.splits,
        **_launch(tiling.attention_warps, on.early),
    )  # fmt: skip


@on_device
def add_matvec(
    inputs: Tensor,
    weight: Weight,
    x: Tensor,
    tile: Tile,
    chosen: Tensor | None = None,
    *,
    early: bool = False,
) -> None:
    """Add weight (D, F) · inputs (1, F) to `x` (D,); with `chosen`, Σ weight[chosen[k]] · inputs[k]."""
    (K, F), D = inputs.shape, x.shape[0]
    columns = min(tile.columns, triton.next_power_of_2(F))
    is_routed = chosen is not None
    products.add_matvec[(triton.cdiv(D, tile.rows),)](
        inputs, chosen if is_routed else inputs, *parts(weight), x, K, D, F, weight.shape[0] if is_routed else 1,
        is_routed, tile.rows, columns, **_launch(tile.warps, early),
    )  # fmt: skip


@on_device
def route(layer: AnyMoE, top_k: int, on: StepBuffers) -> None:
    """Write the `top_k` best experts for `on.x` and their shares of the router's softmax."""
    E, D = layer.router.weight.shape
    tile = on.tiling.router
    columns = min(tile.columns, triton.next_power_of_2(D))
    programs = triton.cdiv(E, tile.rows)
    products.route[(programs,)](
        on.x, layer.norm.weight, *parts(layer.router.weight), on.router, on.tickets[-2:], on.chosen, on.shares,
        top_k, programs, layer.norm.eps, D, E, triton.next_power_of_2(E), tile.rows, columns,
        **_launch(tile.warps, on.early),
    )  # fmt: skip


@on_device
def expert_hidden(layer: AnyMoE, top_k: int, on: StepBuffers) -> None:
    """Write SwiGLU of the gate and up rows of the chosen experts on `on.x`, times their shares."""
    E, D, F = layer.down.shape
    tile = on.tiling.hidden
    columns = min(tile.columns, triton.next_power_of_2(D))
    products.expert_hidden[(triton.cdiv(F, tile.rows), top_k)](
        on.x, layer.norm.weight, on.chosen, on.shares, *parts(layer.gate_up), on.hidden, layer.norm.eps,
        D, F, E, tile.rows, columns, **_launch(tile.warps, on.early),
    )  # fmt: skip


def add_experts(layer: AnyMoE, top_k: int, on: StepBuffers) -> None:
    """Add the sum of the `top_k` best experts to `on.x`: three kernels."""
    route(layer, top_k, on)
    expert_hidden(layer, top_k, on)
    add_matvec(on.hidden[:top_k], layer.down, on.x, on.tiling.down, on.chosen, early=on.early)


@on_device
def pick(on: StepBuffers) -> None:
    """Replace the token by the likeliest of `on.logits`, `BROKEN` without one, and count the position on."""
    V, parts = on.logits.shape[1], on.best.shape[0]
    _pick[(parts,)](
        on.logits, on.limit, on.best, on.where, on.tickets[-1:], on.token, on.position, V, parts,
        PICK_COLUMNS, triton.next_power_of_2(parts), **_launch(4, on.early),
    )  # fmt: skip


@on_device
def forward(decoder: AnyDecoder, plan: Plan, cache: KVCache, on: StepBuffers) -> None:
    """Write the logits after `on.token` at `on.position`; token and position stay unchanged.

    Entry i of the cache, batch 1, belongs to step i of the plan. 6 kernels a step and 2 more.
    """
    D, early = on.x.shape[0], on.early
    columns = min(1024, triton.next_power_of_2(D))
    _embed[(triton.cdiv(D, columns),)](on.token, decoder.embedding, on.x, D, columns, **_launch(4, early))
    for i, (index, top_k) in enumerate(plan.steps):
        block = decoder.blocks[index]
        assert isinstance(block, AnyBlock)
        attention = block.attention
        norm_matvec(on.x, attention.norm, attention.qkv.weight, on.qkv, on.tiling.qkv, early=early)
        attend(attention, decoder.rotary, cache.keys[i, 0], cache.values[i, 0], on)
        add_matvec(on.mixed.unsqueeze(0), attention.out.weight, on.x, on.tiling.out, early=early)
        add_experts(block.moe, top_k, on)
    norm_matvec(on.x, decoder.norm, decoder.head.weight, on.logits, on.tiling.head, early=early)
