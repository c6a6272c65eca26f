"""What decode steps read: names only. `model/quantised.py` makes the weights."""

from __future__ import annotations

from typing import Literal

Weights = Literal["bf16", "fp8", "int8"]
"""`bf16` stands for the weights as they were loaded; the others are copies of one byte a value."""
