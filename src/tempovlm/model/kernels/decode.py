"""One token through the decoder at batch 1, in six kernels a block, each weight read once.

At batch 1 a step is as fast as its weights can be read, and what a kernel leaves idle between its neighbours is
lost. So work is organised by output: a program owns a few rows of one product, reads them once and keeps sums in
float32; norms are folded into the product that follows; the residual stream stays in float32. A block is

1. norm and q, k, v; 2. norm and rotation of q and k, cache entry, attention split over the context; 3. output
projection and residual; 4. norm and router; 5. softmax, choice of the slot-th expert, its gate and up rows, SiLU;
6. down rows of the chosen experts, weighted sum and residual.

Where a result is split over programs, the last program to arrive adds the parts up (flash-decoding, Dao et al.
2023, with a ticket instead of a second kernel). Position and token live on the device, so that one captured graph
serves every position. Weights may be of one byte a value (`model/quantised.py`): a row's scale is applied to its
sum, or to its products where rows of several experts are summed. Knows no request, no graph and no sampling beyond
the likeliest token.

Shapes: `D` width, `H` heads, `W` head width, `E` experts, `K` top-k, `F` expert width, `V` vocabulary, `T`
capacity of the cache, `R` rows of a program, `C` columns that it reads at a time, `N` cached tokens likewise,
`S` splits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from tempovlm.core.plan import Plan
from tempovlm.model.cache import KVCache
from tempovlm.model.config import ModelConfig
from tempovlm.model.kernels.tiles import Tile, Tiling
from tempovlm.model.layers import RMSNorm, Rotary
from tempovlm.model.quantised import AnyAttention, AnyBlock, AnyDecoder, AnyMoE, Weight, parts

PICK_COLUMNS = 2048
"""Logits that one program looks through for the likeliest token."""


@triton.jit
def _embed(token_ptr, table_ptr, x_ptr, D: tl.constexpr, C: tl.constexpr):
    at = tl.program_id(0) * C + tl.arange(0, C)
    token = tl.load(token_ptr).to(tl.int64)
    row = tl.load(table_ptr + token * D + at, mask=at < D, other=0.0)
    tl.store(x_ptr + at, row.to(tl.float32), mask=at < D)


@triton.jit
def _norm_matvec(
    x_ptr, norm_ptr, w_ptr, scales_ptr, out_ptr, rows, eps, D: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    # The norm's scale is one number: it is found beside the sums and applied to them at the end.
    r = tl.program_id(0) * R + tl.arange(0, R)
    at = r.to(tl.int64)[:, None] * D
    c = tl.arange(0, C)
    total = tl.zeros((R, C), dtype=tl.float32)
    squares = tl.zeros((C,), dtype=tl.float32)
    for start in tl.static_range(0, D, C):
        i = start + c
        inside = (r < rows)[:, None] & (i < D)[None, :]
        w = tl.load(w_ptr + at + i[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + i, mask=i < D, other=0.0)
        norm = tl.load(norm_ptr + i, mask=i < D, other=0.0).to(tl.float32)
        total += w.to(tl.float32) * (x * norm)[None, :]
        squares += x * x
    out = tl.sum(total, axis=1) * tl.rsqrt(tl.sum(squares, axis=0) / D + eps)
    if scales_ptr is not None:
        out *= tl.load(scales_ptr + r, mask=r < rows, other=0.0)
    tl.store(out_ptr + r, out, mask=r < rows)


@triton.jit
def _rotated(x_ptr, norm_ptr, first, place, inside, scale, cos, sin, W: tl.constexpr):
    """One head of a vector, normalised with `scale` and rotated (rotate-half form)."""
    partner = tl.where(place < W // 2, place + W // 2, place - W // 2)
    sign = tl.where(place < W // 2, -1.0, 1.0)
    x = tl.load(x_ptr + first + place, mask=inside, other=0.0)
    x *= tl.load(norm_ptr + first + place, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x_ptr + first + partner, mask=inside, other=0.0)
    other *= tl.load(norm_ptr + first + partner, mask=inside, other=0.0).to(tl.float32)
    return (x * cos + sign * other * sin) * scale


@triton.jit
def _attend(
    qkv_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, position_ptr, keys_ptr, values_ptr,
    parts_ptr, sums_ptr, tickets_ptr, out_ptr, capacity, eps, root,
    D: tl.constexpr, W: tl.constexpr, D_PAD: tl.constexpr, W_PAD: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    head, split = tl.program_id(0), tl.program_id(1)
    position = tl.load(position_ptr)
    i, place = tl.arange(0, D_PAD), tl.arange(0, W_PAD)
    inside = place < W
    first = head * W
    q_all = tl.load(qkv_ptr + i, mask=i < D, other=0.0)
    k_all = tl.load(qkv_ptr + D + i, mask=i < D, other=0.0)
    cos = tl.load(cos_ptr + position * W + place, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + position * W + place, mask=inside, other=0.0)
    q_scale = tl.rsqrt(tl.sum(q_all * q_all, axis=0) / D + eps)
    k_scale = tl.rsqrt(tl.sum(k_all * k_all, axis=0) / D + eps)
    q = _rotated(qkv_ptr, q_norm_ptr, first, place, inside, q_scale * root, cos, sin, W)
    k = _rotated(qkv_ptr + D, k_norm_ptr, first, place, inside, k_scale, cos, sin, W)
    v = tl.load(qkv_ptr + 2 * D + first + place, mask=inside, other=0.0)

    # The new token is in no program's range of the cache: the last split writes it and starts its sums with it.
    is_last = split == S - 1
    entry = (head.to(tl.int64) * capacity + position) * W + place
    if is_last:
        tl.store(keys_ptr + entry, k.to(keys_ptr.dtype.element_ty), mask=inside)
        tl.store(values_ptr + entry, v.to(values_ptr.dtype.element_ty), mask=inside)
    top = tl.where(is_last, tl.sum(q * k, axis=0), float("-inf"))
    mass = tl.where(is_last, 1.0, 0.0)
    mixed = tl.where(is_last, v, 0.0)
    cached = head.to(tl.int64) * capacity * W
    for begin in range(split * N, position, S * N):
        n = begin + tl.arange(0, N)
        live = (n < position)[:, None] & inside[None, :]
        at = cached + n[:, None] * W + place[None, :]
        key = tl.load(keys_ptr + at, mask=live, other=0.0).to(tl.float32)
        value = tl.load(values_ptr + at, mask=live, other=0.0).to(tl.float32)
        scores = tl.where(n < position, tl.sum(key * q[None, :], axis=1), float("-inf"))
        highest = tl.maximum(top, tl.max(scores, axis=0))
        weights = tl.exp(scores - highest)
        shrink = tl.exp(top - highest)
        mass = mass * shrink + tl.sum(weights, axis=0)
        mixed = mixed * shrink + tl.sum(weights[:, None] * value, axis=0)
        top = highest

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
def _expert_hidden(
    x_ptr, norm_ptr, router_ptr, w_ptr, scales_ptr, hidden_ptr, chosen_ptr, eps,
    D: tl.constexpr, F: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    tile, slot = tl.program_id(0), tl.program_id(1)
    e = tl.arange(0, E_PAD)
    scores = tl.load(router_ptr + e, mask=e < E, other=float("-inf"))
    masses = tl.exp(scores - tl.max(scores, axis=0))
    # The expert of this slot is the one that `slot` others beat; equal scores go to the lower index.
    beats = (scores[None, :] > scores[:, None]) | (
        (scores[None, :] == scores[:, None]) & (e[None, :] < e[:, None])
    )
    mine = tl.sum(beats.to(tl.int32), axis=1) == slot
    expert = tl.minimum(tl.sum(tl.where(mine, e, 0), axis=0), E - 1)
    weight = tl.sum(tl.where(mine, masses, 0.0), axis=0) / tl.sum(masses, axis=0)

    f, c = tile * R + tl.arange(0, R), tl.arange(0, C)
    at = expert.to(tl.int64) * (2 * F * D) + f[:, None] * D
    gate = tl.zeros((R, C), dtype=tl.float32)
    up = tl.zeros((R, C), dtype=tl.float32)
    squares = tl.zeros((C,), dtype=tl.float32)
    for start in tl.static_range(0, D, C):
        i = start + c
        inside = (f < F)[:, None] & (i < D)[None, :]
        w_gate = tl.load(w_ptr + at + i[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
        w_up = tl.load(w_ptr + at + F * D + i[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + i, mask=i < D, other=0.0)
        normed = x * tl.load(norm_ptr + i, mask=i < D, other=0.0).to(tl.float32)
        gate += w_gate.to(tl.float32) * normed[None, :]
        up += w_up.to(tl.float32) * normed[None, :]
        squares += x * x
    scale = tl.rsqrt(tl.sum(squares, axis=0) / D + eps)
    gate_rows = tl.sum(gate, axis=1) * scale
    up_rows = tl.sum(up, axis=1) * scale
    if scales_ptr is not None:
        gate_rows *= tl.load(scales_ptr + expert * 2 * F + f, mask=f < F, other=0.0)
        up_rows *= tl.load(scales_ptr + expert * 2 * F + F + f, mask=f < F, other=0.0)
    hidden = gate_rows * tl.sigmoid(gate_rows) * up_rows * weight
    tl.store(hidden_ptr + slot * F + f, hidden, mask=f < F)
    tl.store(chosen_ptr + slot, expert, mask=tile == 0)


@triton.jit
def _add_product(
    total, slot, in_ptr, chosen_ptr, w_ptr, scales_ptr, r, c, D: tl.constexpr, F: tl.constexpr,
    ROUTED: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Sums (R, C) plus the products of one slot's input with rows `r` of its matrix."""
    row = r.to(tl.int64)
    if ROUTED:
        row += tl.load(chosen_ptr + slot).to(tl.int64) * D
    at = row[:, None] * F
    if scales_ptr is not None:
        scales = tl.load(scales_ptr + row, mask=r < D, other=0.0)[:, None]
    for start in tl.static_range(0, F, C):
        f = start + c
        inside = (r < D)[:, None] & (f < F)[None, :]
        w = tl.load(w_ptr + at + f[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
        value = tl.load(in_ptr + slot * F + f, mask=f < F, other=0.0)[None, :]
        total += w.to(tl.float32) * (value if scales_ptr is None else value * scales)
    return total


@triton.jit
def _add_matvec(
    in_ptr, chosen_ptr, w_ptr, scales_ptr, x_ptr, K, D: tl.constexpr, F: tl.constexpr, ROUTED: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    # x[D] += Σ over K of w[chosen] (D, F) · in (K, F); a single plain product where nothing is routed.
    r, c = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, C)
    total = tl.zeros((R, C), dtype=tl.float32)
    # Two slots a turn: enough loads under way, and no more than registers hold.
    for pair in range(0, K // 2):
        total = _add_product(total, 2 * pair, in_ptr, chosen_ptr, w_ptr, scales_ptr, r, c, D, F, ROUTED, C)
        total = _add_product(total, 2 * pair + 1, in_ptr, chosen_ptr, w_ptr, scales_ptr, r, c, D, F, ROUTED, C)
    if K % 2 == 1:
        total = _add_product(total, K - 1, in_ptr, chosen_ptr, w_ptr, scales_ptr, r, c, D, F, ROUTED, C)
    x = tl.load(x_ptr + r, mask=r < D, other=0.0)
    tl.store(x_ptr + r, x + tl.sum(total, axis=1), mask=r < D)


@triton.jit
def _pick(
    logits_ptr, best_ptr, where_ptr, ticket_ptr, token_ptr, position_ptr, V, parts,
    C: tl.constexpr, P_PAD: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * C + tl.arange(0, C)
    values = tl.load(logits_ptr + at, mask=at < V, other=float("-inf"))
    best = tl.max(values, axis=0)
    tl.store(best_ptr + tl.program_id(0), best)
    tl.store(where_ptr + tl.program_id(0), tl.min(tl.where(values == best, at, V - 1), axis=0))
    tl.debug_barrier()
    if tl.atomic_add(ticket_ptr, 1) == parts - 1:
        p = tl.arange(0, P_PAD)
        bests = tl.load(best_ptr + p, mask=p < parts, other=float("-inf"), cache_modifier=".cg")
        places = tl.load(where_ptr + p, mask=p < parts, other=2147483647, cache_modifier=".cg")
        token = tl.min(tl.where(bests == tl.max(bests, axis=0), places, V - 1), axis=0)
        tl.store(token_ptr, token.to(tl.int64))
        tl.store(position_ptr, tl.load(position_ptr) + 1)
        tl.store(ticket_ptr, 0)


def _floats(*shape: int, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device=device)


@dataclass(frozen=True, slots=True)
class StepBuffers:
    """What a step reads and writes beside weights and cache; addresses never change.

    Attributes:
        token: (1,) the last token, int64, replaced by the next one. position: (1,) its place, int32, counted on.
        x: (D,) the residual stream. logits: (1, V), float32. top_k: experts for which there is room.
        tickets: (H + 1,) arrivals at the attention's heads and at the choice of the token; zero between steps.
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
    logits: Tensor
    best: Tensor
    where: Tensor
    tiling: Tiling = field(default_factory=Tiling)

    @classmethod
    def allocate(
        cls, config: ModelConfig, top_k: int, device: torch.device, tiling: Tiling | None = None
    ) -> StepBuffers:
        """Room for plans of at most `top_k` experts a token."""
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
            tickets=integers(H + 1),
            mixed=_floats(D, device=device),
            router=_floats(config.num_experts, device=device),
            hidden=_floats(top_k, config.expert_width, device=device),
            chosen=integers(top_k),
            logits=_floats(1, V, device=device),
            best=_floats(parts, device=device),
            where=integers(parts),
            tiling=tiling,
        )


def norm_matvec(x: Tensor, norm: RMSNorm, weight: Weight, out: Tensor, tile: Tile) -> None:
    """Write weight (rows, D) · norm(x) to `out`; `x` and `out` are float32 vectors."""
    rows, D = weight.shape
    columns = min(tile.columns, triton.next_power_of_2(D))
    grid = (triton.cdiv(rows, tile.rows),)
    _norm_matvec[grid](
        x, norm.weight, *parts(weight), out, rows, norm.eps, D, tile.rows, columns, num_warps=tile.warps
    )


def attend(layer: AnyAttention, rotary: Rotary, keys: Tensor, values: Tensor, on: StepBuffers) -> None:
    """Add this token's key and value to the (H, T, W) cache entries and write attention over all to `on.mixed`."""
    H, T, W = keys.shape
    D, tiling = H * W, on.tiling
    _attend[(H, tiling.splits)](
        on.qkv, layer.q_norm.weight, layer.k_norm.weight, rotary.cos, rotary.sin, on.position, keys, values,
        on.parts, on.sums, on.tickets, on.mixed, T, layer.q_norm.eps, W**-0.5,
        D, W, triton.next_power_of_2(D), triton.next_power_of_2(W), tiling.tokens, tiling.splits,
        num_warps=tiling.attention_warps,
    )  # fmt: skip


def add_matvec(inputs: Tensor, weight: Weight, x: Tensor, tile: Tile, chosen: Tensor | None = None) -> None:
    """Add weight (D, F) · inputs (1, F) to `x` (D,); with `chosen`, Σ weight[chosen[k]] · inputs[k]."""
    (K, F), D = inputs.shape, x.shape[0]
    columns = min(tile.columns, triton.next_power_of_2(F))
    is_routed = chosen is not None
    _add_matvec[(triton.cdiv(D, tile.rows),)](
        inputs, chosen if is_routed else inputs, *parts(weight), x, K, D, F, is_routed, tile.rows, columns,
        num_warps=tile.warps,
    )  # fmt: skip


def expert_hidden(layer: AnyMoE, top_k: int, on: StepBuffers) -> None:
    """Choose experts by `on.router`; write them, and what their gate and up rows make of `on.x`."""
    E, D, F = layer.down.shape
    tile = on.tiling.hidden
    columns = min(tile.columns, triton.next_power_of_2(D))
    _expert_hidden[(triton.cdiv(F, tile.rows), top_k)](
        on.x, layer.norm.weight, on.router, *parts(layer.gate_up), on.hidden, on.chosen, layer.norm.eps,
        D, F, E, triton.next_power_of_2(E), tile.rows, columns, num_warps=tile.warps,
    )  # fmt: skip


def add_experts(layer: AnyMoE, top_k: int, on: StepBuffers) -> None:
    """Add the sum of the `top_k` best experts to `on.x`: three kernels."""
    norm_matvec(on.x, layer.norm, layer.router.weight, on.router, on.tiling.router)
    expert_hidden(layer, top_k, on)
    add_matvec(on.hidden[:top_k], layer.down, on.x, on.tiling.down, on.chosen)


def pick(on: StepBuffers) -> None:
    """Replace the token by the likeliest of `on.logits` and count the position on."""
    V, parts = on.logits.shape[1], on.best.shape[0]
    _pick[(parts,)](
        on.logits, on.best, on.where, on.tickets[-1:], on.token, on.position, V, parts,
        PICK_COLUMNS, triton.next_power_of_2(parts),
    )  # fmt: skip


def forward(decoder: AnyDecoder, plan: Plan, cache: KVCache, on: StepBuffers) -> None:
    """Write the logits after `on.token` at `on.position`; token and position are left as they are.

    Entry i of the cache, batch 1, belongs to step i of the plan. 6 kernels a step and 2 more.
    """
    D = on.x.shape[0]
    columns = min(1024, triton.next_power_of_2(D))
    _embed[(triton.cdiv(D, columns),)](on.token, decoder.embedding, on.x, D, columns)
    for i, (index, top_k) in enumerate(plan.steps):
        block = decoder.blocks[index]
        assert isinstance(block, AnyBlock)
        attention = block.attention
        norm_matvec(on.x, attention.norm, attention.qkv.weight, on.qkv, on.tiling.qkv)
        attend(attention, decoder.rotary, cache.keys[i, 0], cache.values[i, 0], on)
        add_matvec(on.mixed.unsqueeze(0), attention.out.weight, on.x, on.tiling.out)
        add_experts(block.moe, top_k, on)
    norm_matvec(on.x, decoder.norm, decoder.head.weight, on.logits, on.tiling.head)
