"""Pictures cut on CUDA: the crops of the host's exact mode, without the host ever waiting for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import tiny_model
from tempovlm.api import load
from tempovlm.core.request import Request
from tempovlm.model.config import MOLMOE_1B, POCKET, VisionConfig
from tempovlm.model.vision.device_crops import cut_on_device
from tempovlm.model.vision.tiling import CROPS_OF_TIER, Crops, cut_crops, live_crops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CUDA = torch.device("cuda")
TOLERANCE = 1e-5
SHAPES = ((1, 1), (1, 500), (7, 5), (3000, 40), (84, 112), (336, 336), (640, 427), (1080, 1920), (3024, 4032))
BOTH = pytest.mark.parametrize("vision", [MOLMOE_1B.vision, POCKET.vision], ids=["molmoe-1b", "pocket"])
PEAK_BYTES = 1 << 30


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_alike(found: Crops, exact: Crops) -> None:
    assert found.grid == exact.grid
    assert found.live is not None
    assert {one.device.type for one in (found.patches, found.index, found.masks, found.live)} == {"cuda"}
    patches = found.patches.cpu()
    torch.testing.assert_close(patches, exact.patches, rtol=0, atol=TOLERANCE)
    assert torch.equal(found.index.cpu(), exact.index)
    assert torch.equal(found.masks.cpu(), exact.masks)
    assert torch.equal(found.live.cpu(), live_crops(patches))


@BOTH
@pytest.mark.parametrize("tier", CROPS_OF_TIER)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_crops_are_those_of_the_hosts_exact_mode(shape: tuple[int, int], tier: str, vision: VisionConfig) -> None:
    image = tiny_model.picture(0, *shape)
    assert_alike(cut_on_device(image, tier, vision, CUDA, exact=True), cut_crops(image, tier, vision, exact=True))


def test_the_largest_pictures_need_little_memory() -> None:
    image = tiny_model.picture(1, 7071, 7071)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = cut_on_device(image, "high", MOLMOE_1B.vision, CUDA, exact=True)
    assert torch.cuda.max_memory_allocated() - before < PEAK_BYTES
    assert_alike(found, cut_crops(image, "high", MOLMOE_1B.vision, exact=True))


def test_very_long_pictures_come_from_the_host() -> None:
    image = tiny_model.picture(2, 2, 70_000)
    assert_alike(
        cut_on_device(image, "medium", POCKET.vision, CUDA, exact=True),
        cut_crops(image, "medium", POCKET.vision, exact=True),
    )


def test_preparing_never_waits_and_pinned_memory_is_not_reused_too_early(tmp_path: Path) -> None:
    """New sizes bring new tables; pictures of one size share what the host keeps."""
    run = load(str(tiny_model.save_folder(tmp_path / "tiny")), device="cuda", progress=False).engine.runner
    request = Request(images=(), question="what is the sign?")
    run.prepare(tiny_model.picture(), "high", request)  # constants come to the device once
    images = [tiny_model.picture(seed, 720, 1280) for seed in range(8)] + [tiny_model.picture(9, 333, 222)]
    torch.cuda.synchronize()
    with no_waiting():
        ready = [run.prepare(image, "high", request) for image in images]
    for image, one in zip(images, ready, strict=True):
        assert one.crops is not None
        assert_alike(one.crops, cut_crops(image, "high", run.model.config.vision, exact=True))
