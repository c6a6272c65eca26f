"""Tile sizes for the products of a decode step: numbers only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tile:
    """Tiling of one product: rows of a program, columns that it reads at a time, its warps."""

    rows: int
    columns: int
    warps: int = 4


@dataclass(frozen=True, slots=True)
class Tiling:
    """Tiling of every product, by whole rows so that all loads start at once, and the split of the context."""

    qkv: Tile = Tile(4, 2048, 8)
    out: Tile = Tile(2, 2048, 4)
    router: Tile = Tile(8, 2048, 8)
    hidden: Tile = Tile(4, 2048, 8)
    down: Tile = Tile(4, 1024)
    head: Tile = Tile(4, 1024)
    splits: int = 16
    tokens: int = 64
    attention_warps: int = 4
