"""Names of the weight formats used for decoding. `model/quantised.py` makes the weights."""

from __future__ import annotations

from typing import Literal

DecodeDtype = Literal["bf16", "fp8", "int8"]
"""`bf16` stands for the weights as loaded; the others are copies with one byte a value."""
