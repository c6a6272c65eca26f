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
    """How every product of a step is cut, and over how many programs a head's context is split."""

    qkv: Tile = Tile(8, 512)
    out: Tile = Tile(4, 1024)
    router: Tile = Tile(2, 1024)
    hidden: Tile = Tile(8, 512, 8)
    down: Tile = Tile(4, 1024)
    head: Tile = Tile(16, 512, 8)
    splits: int = 16
    tokens: int = 32
    attention_warps: int = 4
