"""Start kernels on the right device: Triton uses the thread's current one, wherever the tensors are.

A thread's current device is the first one until it is set, so every function that starts a kernel sets it for as
long as that takes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def on_device(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function while the device of its first argument that has one is the thread's current device.

    Every function that starts a kernel is wrapped by this (`tests/test_house_rules.py`). On a CPU, where kernels
    are interpreted, it changes nothing.

    Raises:
        ValueError: at the call, if no positional argument has a device.
    """

    @wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> R:
        with torch.cuda.device(_index_of(args)):
            return function(*args, **options)

    return run


def _index_of(args: tuple[object, ...]) -> int:
    """Return the CUDA device's index of the first argument that has a device; -1, which sets none, for a CPU."""
    for arg in args:
        device = getattr(arg, "device", None)
        if isinstance(device, torch.device):
            return device.index if device.type == "cuda" else -1
    raise ValueError("no argument has a device: give the tensors by their places")
