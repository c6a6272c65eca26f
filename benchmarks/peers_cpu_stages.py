"""The stages that a peer of the CPU benchmark offers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Stage = Callable[..., list[Any]]
"""A stage that is ready to run: its inputs, tensors or outputs of other stages, to its outputs."""
