#!/usr/bin/env bash
# A PNG with a palette is resized by the nearest pixel, whatever filter is asked for; thumbnail does the same.
#
# Versions: pillow 13.0.0, numpy 2.4.6.
# Behaviour: places in a palette cannot be averaged, so resize and thumbnail take Resampling.NEAREST for the modes "P" and
#   "1" without a word. draft and reducing_gap change nothing. Converted to RGB first, the filter is used.
# Output: a chart of 192 x 192 with two colours, to 60 x 60 by BICUBIC: as a palette equal to NEAREST at every pixel, and
#   64 of 255 from the same picture resized as RGB.
# Wrong guess: the mode is how a file is stored, and equal pixels give equal thumbnails. Screenshots and charts are saved
#   with palettes to be small: `resize` before `convert("RGB")` shows a model broken letters, and only of those files.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check pillow==13.0.0 numpy==2.4.6
"$dir/venv/bin/python" - <<'EOF'
import io

import numpy as np
from PIL import Image

cells = np.random.default_rng(0).integers(0, 2, (64, 64), dtype=np.uint8)
chart = Image.fromarray(255 * np.kron(cells, np.ones((3, 3), np.uint8))).convert("RGB")
file = io.BytesIO()
chart.convert("P", palette=Image.Palette.ADAPTIVE, colors=16).save(file, "PNG")
stored = Image.open(file)
assert stored.mode == "P" and np.array_equal(stored.convert("RGB"), chart), "the palette has other colours"

BICUBIC, NEAREST, SIZE = Image.Resampling.BICUBIC, Image.Resampling.NEAREST, (60, 60)
as_palette = np.array(stored.resize(SIZE, BICUBIC).convert("RGB"))
as_rgb = np.array(stored.convert("RGB").resize(SIZE, BICUBIC))
nearest = np.array(chart.resize(SIZE, NEAREST))
small = stored.copy()
small.thumbnail(SIZE, BICUBIC)
apart = np.abs(as_palette.astype(int) - as_rgb).mean()
print("palette is nearest:", np.array_equal(as_palette, nearest), "| from RGB by the same filter:", round(apart, 1))
assert np.array_equal(as_palette, nearest), "the filter is used"
assert np.array_equal(np.array(small.convert("RGB")), nearest), "thumbnail uses the filter"
assert apart > 30 and len(np.unique(as_rgb)) > 100 and len(np.unique(as_palette)) == 2, "RGB is resized alike"
EOF
