#!/usr/bin/env bash
# antialias=True, which is there for shrinking, also changes how torch enlarges by bicubic: an edge by 9 of 255 levels.
#
# Versions: torch 2.13.0 (CPU), pillow 13.0.0, numpy 2.4.6.
# Behaviour: interpolate(mode="bicubic") weighs neighbours by a cubic with the constant -0.75, as OpenCV does; with
#   antialias=True by one with -0.5, as Pillow does, whether it shrinks or not. For "bilinear" the flag changes nothing
#   where a picture is enlarged.
# Output: an edge from 0 to 1, six pixels made twelve: it passes 1 by 0.105 without the flag, by 0.070 with it and in
#   Pillow; bilinear: equal.
# Wrong guess: without shrinking there is nothing to smooth, so the flag may be left out or set by the direction. Small
#   pictures that are enlarged to a model's crop then have edges that it was not trained on.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6 pillow==13.0.0
"$dir/venv/bin/python" - <<'EOF'
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

SMALL, LARGE = 6, 12
edge = torch.tensor([0.0, 0, 0, 1, 1, 1]).repeat(SMALL, 1)


def by_torch(mode, antialias):
    return interpolate(edge[None, None], size=(LARGE, LARGE), mode=mode, antialias=antialias)[0, 0].numpy()


def by_pillow(filter_):
    return np.asarray(Image.fromarray(edge.numpy()).resize((LARGE, LARGE), filter_))


plain, smooth, pillow = by_torch("bicubic", False), by_torch("bicubic", True), by_pillow(Image.Resampling.BICUBIC)
linear = [by_torch("bilinear", False), by_torch("bilinear", True), by_pillow(Image.Resampling.BILINEAR)]
print("largest value:", *(f"{one.max():.3f}" for one in (plain, smooth, pillow)), "(torch, with antialias, Pillow)")
print(f"largest difference of bicubic: {255 * np.abs(plain - smooth).max():.1f} of 255 levels")
assert np.abs(smooth - pillow).max() < 1e-5, "antialias is not Pillow's bicubic"
assert np.abs(plain - smooth).max() > 0.02, "the flag changes nothing"
assert all(np.abs(one - linear[0]).max() < 1e-5 for one in linear), "bilinear differs too"
EOF
