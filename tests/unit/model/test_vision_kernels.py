"""The vision side's kernels against the plain modules; in Triton's interpreter without a GPU."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch

import tiny_model
from tempovlm.model.vision import kernels_for

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return importlib.import_module("tempovlm.model.kernels.vision")


@pytest.mark.parametrize("width", [32, 40, 1024])
def test_add_norm(kernels: ModuleType, width: int) -> None:
    torch.manual_seed(width)
    norm = torch.nn.LayerNorm(width, eps=1e-5, device=DEVICE)
    norm.weight.data.uniform_(0.5, 1.5)
    norm.bias.data.normal_()
    x, delta = 3 + torch.randn(2, 2, 5, width, device=DEVICE)
    with torch.inference_mode():
        total, out = kernels.add_norm(x, delta, norm)
        torch.testing.assert_close(total, x + delta)
        torch.testing.assert_close(out, norm(x + delta), rtol=1e-4, atol=1e-5)


def test_the_norm_is_of_the_rounded_sum(kernels: ModuleType) -> None:
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(64, device=DEVICE, dtype=torch.bfloat16)
    x, delta = torch.randn(2, 7, 64, device=DEVICE, dtype=torch.bfloat16)
    with torch.inference_mode():
        total, out = kernels.add_norm(x, delta, norm)
        # The interpreter cuts where a GPU rounds.
        torch.testing.assert_close(total, x + delta, rtol=2**-7, atol=0)
        torch.testing.assert_close(out, norm(total), rtol=1e-2, atol=1e-2)


def test_the_fused_layers_are_the_plain_ones(kernels: ModuleType) -> None:
    vision, config = tiny_model.build_model().vision.to(DEVICE), tiny_model.CONFIG.vision
    x = torch.randn(3, config.num_patches + 1, config.width, device=DEVICE)
    with torch.inference_mode():
        plain, fused = vision.layers(x), vision.fused_layers(x, kernels)
    assert list(fused) == list(plain) == sorted(config.feature_blocks)
    for block, expected in plain.items():
        torch.testing.assert_close(fused[block], expected, rtol=1e-4, atol=1e-4)


def test_the_fused_projector_is_the_plain_one(kernels: ModuleType) -> None:
    projector, config = tiny_model.build_model().projector.to(DEVICE), tiny_model.CONFIG.vision
    features = torch.randn(2, config.num_patches, config.feature_width, device=DEVICE)
    masks = torch.tensor([0.0, 0.25, 1.0, -1.0], device=DEVICE)  # empty, partly padded, picture, no crop's mask
    masks = masks[torch.randint(4, (2, config.num_patches), device=DEVICE)]
    expected = projector(features, masks).detach()  # with gradients, so that the plain operations run
    with torch.inference_mode():
        torch.testing.assert_close(projector.fused(features, masks, kernels), expected, rtol=1e-4, atol=1e-4)


def test_the_plain_modules_run_on_a_cpu_and_with_gradients() -> None:
    with torch.inference_mode():
        assert kernels_for(torch.zeros(1)) is None
    assert kernels_for(torch.zeros(1, device=DEVICE)) is None
