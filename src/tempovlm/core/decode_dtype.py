"""Names of the weight formats used for decoding, and of what runs a CPU's stages."""

from __future__ import annotations

from typing import Literal

DecodeDtype = Literal["bf16", "fp8", "int8"]
"""`bf16` stands for the weights as loaded; the others are copies with one byte a value: `model/quantised.py`."""

Backend = Literal["auto", "kernels", "torch"]
"""`kernels` are ours for a CPU, `engine/cpu`; `torch` runs the modules; `auto`: kernels where they can run."""
