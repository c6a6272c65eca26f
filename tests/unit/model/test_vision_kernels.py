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
def test_norm_of_what_lacks_a_bias(kernels: ModuleType, width: int) -> None:
    torch.manual_seed(width)
    norm = torch.nn.LayerNorm(width, eps=1e-5, device=DEVICE)
    norm.weight.data.uniform_(0.5, 1.5)
    norm.bias.data.normal_()
    x, bias = 3 + torch.randn(2, 5, width, device=DEVICE), torch.randn(width, device=DEVICE)
    sums = torch.full((3, width), torch.nan, device=DEVICE)
    sums[1] = torch.randn(width, device=DEVICE)
    with torch.inference_mode():
        out = kernels.biased_norm(x, sums, 1, bias, norm)
        torch.testing.assert_close(sums[2], sums[1] + bias)
        torch.testing.assert_close(out, norm(x + sums[2]), rtol=1e-4, atol=1e-5)
    assert sums[0].isnan().all()


def test_the_fused_features_are_the_plain_ones(kernels: ModuleType) -> None:
    vision, config = tiny_model.build_model().vision.to(DEVICE), tiny_model.CONFIG.vision
    for name, parameter in vision.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    x = torch.randn(3, config.num_patches + 1, config.width, device=DEVICE)
    with torch.inference_mode():
        kept = vision.layers(x)
        plain = torch.cat([kept[i][:, 1:] for i in vision.keep], dim=-1)
        torch.testing.assert_close(vision.fused_features(x, kernels), plain, rtol=1e-4, atol=1e-4)


def test_an_aligned_embedding_is_the_embedding() -> None:
    vision, config = tiny_model.build_model().vision, tiny_model.CONFIG.vision
    vision.patch_embedding = torch.nn.Linear(config.patch_values - 3, config.width, bias=False)
    patches = torch.randn(2, config.num_patches, config.patch_values - 3)
    with torch.inference_mode():
        torch.testing.assert_close(vision._embed_aligned(patches), vision.patch_embedding(patches))


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
