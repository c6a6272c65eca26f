"""Which device is current while a kernel starts, with a stand-in for what torch asks the driver."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny_model

pytest.importorskip("triton")


class Driver:
    """Keeps the current device of the one thread that asks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = 0
        self.seen: list[int] = []
        monkeypatch.setattr(torch.cuda, "device", self.device)

    @contextmanager
    def device(self, index: int) -> Iterator[None]:
        before, self.current = self.current, self.current if index < 0 else index
        try:
            yield
        finally:
            self.current = before

    def kernel(self, *_args: object, **_options: object) -> None:
        self.seen.append(self.current)


class Tensor:
    """Says where it is, and computes nothing."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


def on_device(function: Any) -> Any:
    return importlib.import_module("tempovlm.model.kernels.device").on_device(function)


@pytest.mark.parametrize("index", [0, 1, 3])
def test_the_first_argument_with_a_device_decides(driver: Driver, index: int) -> None:
    start = on_device(driver.kernel)
    start(Tensor(f"cuda:{index}"), Tensor("cuda:0"))
    start(object(), None, torch.nn.Linear(1, 1), (Tensor("cuda:2"),), Tensor(f"cuda:{index}"), warps=4)
    assert driver.seen == [index, index]
    assert driver.current == 0


def test_it_is_set_back_by_failures_and_inner_functions(driver: Driver) -> None:
    inner = on_device(driver.kernel)

    @on_device
    def outer(x: Tensor, other: Tensor) -> None:
        inner(other)
        inner(x)
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        outer(Tensor("cuda:1"), Tensor("cuda:2"))
    assert driver.seen == [2, 1]
    assert driver.current == 0


def test_a_cpu_sets_none_and_no_device_is_an_error(driver: Driver) -> None:
    driver.current = 5
    on_device(driver.kernel)(torch.zeros(1))
    assert driver.seen == [5]
    with pytest.raises(ValueError, match="no argument has a device"):
        on_device(driver.kernel)(None, 3, SimpleNamespace(device="cuda:1"))


def test_step_buffers_say_where_they_are() -> None:
    decode = importlib.import_module("tempovlm.model.kernels.decode")
    on = decode.StepBuffers.allocate(tiny_model.CONFIG, 2, torch.device("cpu"))
    assert on.device == on.logits.device
    decode.pick(on)
    assert on.position.tolist() == [1]
