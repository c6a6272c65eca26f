#!/usr/bin/env bash
# An image may cost more tokens than Qwen-VL's max_pixels allows: a banner costs three times as many, without a warning.
#
# Versions: transformers 5.24.0, pillow 13.0.0, numpy 2.4.6 (the processor's PIL version, no torch).
# Behaviour: an image too large is shrunk in proportion and each side cut to whole cells of 28 pixels, but to one cell
#   at least. Where the short side would be less than a cell, it is one, and the long side is not shortened for it.
#   Lines of text, timelines and toolbars are such images.
# Output: tokens at a limit of 16 cells: 600 x 600 9, 1200 x 28 26, 3200 x 16 56.
# Wrong guess: max_pixels / 28**2 bounds the tokens of an image, as the function's description says, so a cache or a
#   deadline can be laid out for it.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check numpy==2.4.6 pillow==13.0.0 transformers==5.24.0
cat > "$dir/cells.py" <<'EOF'
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


def tokens(width, height, cells):
    """Count the tokens that an image becomes: four patches are one."""
    processor = Qwen2VLImageProcessorPil(min_pixels=4 * 28**2, max_pixels=cells * 28**2)
    grid = processor(images=[Image.new("RGB", (width, height))], return_tensors="np").image_grid_thw[0]
    return int(grid.prod()) // 4


cost = {size: tokens(*size, cells=16) for size in ((600, 600), (1200, 28), (3200, 16))}
for (width, height), count in cost.items():
    print(f"{width} x {height}: {count} tokens at a limit of 16")
assert cost[600, 600] <= 16, "a square is not within the limit"
assert cost[1200, 28] > 16 and cost[3200, 16] > 3 * 16, "a banner is within the limit, or nearer to it"
EOF
"$dir/venv/bin/python" "$dir/cells.py"
