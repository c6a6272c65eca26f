"""The engine on CUDA: the same tokens as on the CPU, and stages that add up by the device's own clock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_model
from tempovlm.api import TempoVLM, load
from tempovlm.control.guard import Guard
from tempovlm.control.learned.observation import vision_feature
from tempovlm.control.policy import Policy, Question, Sight
from tempovlm.control.select import Floats
from tempovlm.core.request import Request
from tempovlm.latency.clock import stage_clock
from timings import stages_add_up

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

Loader = Callable[..., TempoVLM]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.save_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(tiny_model.picture())


def test_same_tokens_as_on_the_cpu(folder: Path, picture: Image.Image) -> None:
    cpu, cuda = (load(str(folder), device=device, dtype=torch.float32) for device in ("cpu", "cuda"))
    for knobs in (cpu.space.cheapest, cpu.space.native, cpu.space.largest):
        expected, answer = (one.answer(picture, "what is the sign?", knobs=knobs) for one in (cpu, cuda))
        assert answer.tokens == expected.tokens
    pairs = [(picture, "what is the sign?"), (None, "stop"), (picture, "is there a dog there?")]
    batches = [one.answer_batch(pairs) for one in (cpu, cuda)]
    assert [a.tokens for a in batches[0]] == [a.tokens for a in batches[1]]


def test_stages_add_up_and_budgets_choose(folder: Path, picture: Image.Image) -> None:
    model = load(str(folder), device="cuda", progress=False)
    for budget_ms in (None, 0.01, 1e4):
        answer = model.answer(picture, "what is the sign?", budget_ms)
        assert stages_add_up(answer.timings_ms)
    assert answer.device.startswith("cuda")
    assert answer.budget_feasible is True
    assert model.stamp().device == "cuda/bfloat16"


def test_the_clock_tells_whether_the_device_has_work_left() -> None:
    clock = stage_clock(torch.device("cuda"))
    clock.elapsed_ms()
    assert not clock.is_device_busy()
    torch.cuda._sleep(1_000_000_000)  # cycles: half a second
    assert clock.is_device_busy()
    clock.elapsed_ms()
    assert not clock.is_device_busy()


class Seeing(Policy):
    """Scores later settings higher, and keeps what it saw."""

    name = "seeing"
    sees_picture = True

    def __init__(self, count: int) -> None:
        self.count, self.seen = count, list[Sight]()

    def look(self, question: Question, left_ms: float) -> Floats:
        del question, left_ms
        return np.arange(self.count, dtype=float)

    def settle(self, question: Question, sight: Sight, left_ms: float) -> Floats:
        self.seen.append(sight)
        return self.look(question, left_ms)


def test_the_second_choice_sees_the_picture_after_any_rehearsal(folder: Path, picture: Image.Image) -> None:
    model = load(str(folder), device="cuda", progress=False)
    policy = Seeing(len(model.space))
    everything = tuple(range(len(model.space)))
    request = Request(images=(picture,), question="what is the sign?", budget_ms=1e5)
    for second_ms in (0.0, None):  # rehearsed where the device is still busy, and never
        policy.seen.clear()
        guard = Guard(policy, model.space, everything, model.calibrate(), second_ms=second_ms)
        answer = model.engine.answer(request, guard)
        assert answer.knobs == model.space.largest
        assert 1 <= len(policy.seen) <= 1 + (second_ms is not None)
        assert all(sight.vision is None for sight in policy.seen[:-1])
        last = policy.seen[-1]
        np.testing.assert_allclose(last.pooled.numpy(), vision_feature(last.vision), rtol=1e-4, atol=1e-5)
        assert stages_add_up(answer.timings_ms)
