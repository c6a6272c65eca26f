"""How the products of a decode step are cut into programs. Numbers only; knows no kernel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tile:
    """How one product is cut: rows of a program, columns that it reads at a time, its warps."""

    rows: int
    columns: int
    warps: int = 4


@dataclass(frozen=True, slots=True)
class Tiling:
    """How every product is cut, by whole rows so that all loads start at once, and how the context is split."""

    qkv: Tile = Tile(4, 2048, 8)
    out: Tile = Tile(2, 2048, 4)
    router: Tile = Tile(8, 2048, 8)
    hidden: Tile = Tile(4, 2048, 8)
    down: Tile = Tile(4, 1024)
    head: Tile = Tile(4, 1024)
    splits: int = 16
    tokens: int = 64
    attention_warps: int = 4
