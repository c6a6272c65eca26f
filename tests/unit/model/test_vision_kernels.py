"""The vision side's kernels against the plain modules; in Triton's interpreter without a GPU."""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import ModuleType

import pytest
import torch

import tiny_model
from tempovlm.model.layers import quick_gelu
from tempovlm.model.vision.encoder import kernels_for, product_parts

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


def test_parts_of_a_product_join_what_is_normalised(kernels: ModuleType) -> None:
    norm = torch.nn.LayerNorm(40, eps=1e-5, device=DEVICE)
    x, parts, sums = (torch.randn(*shape, 40, device=DEVICE) for shape in ((3, 2), (2, 6), (2,)))
    bias = torch.randn(40, device=DEVICE)
    expected = x + parts.sum(dim=0).view_as(x)
    with torch.inference_mode():
        out = kernels.biased_norm(x, sums, 0, bias, norm, parts)
        torch.testing.assert_close(x, expected)
        torch.testing.assert_close(out, norm(expected + sums[0] + bias), rtol=1e-4, atol=1e-5)
        hidden, weight = torch.randn(6, 24, device=DEVICE), torch.randn(40, 24, device=DEVICE)
        torch.testing.assert_close(product_parts(hidden, weight).sum(dim=0), hidden @ weight.t())


@pytest.mark.parametrize(("rows", "width", "out"), [(1, 64, 128), (300, 72, 136), (1100, 40, 8)])
def test_a_product_that_ends_in_the_activation(kernels: ModuleType, rows: int, width: int, out: int) -> None:
    torch.manual_seed(rows)
    layer = torch.nn.Linear(width, out, device=DEVICE)
    x = torch.randn(rows, width, device=DEVICE)
    if DEVICE == "cuda":  # the interpreter multiplies no bfloat16, and float32 is the library's on a GPU
        layer, x = layer.bfloat16(), x.bfloat16()
    with torch.inference_mode():
        ours = kernels.product_gelu(x, layer).float()
        right = quick_gelu(torch.nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float()))
    assert (ours - right).norm() <= 5e-3 * right.norm()


def test_the_fused_features_are_the_plain_ones(kernels: ModuleType) -> None:
    config = replace(tiny_model.CONFIG.vision, crop_size=64, margins=(1, 1))
    vision = tiny_model.build_model(config=replace(tiny_model.CONFIG, vision=config)).vision.to(DEVICE)
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
