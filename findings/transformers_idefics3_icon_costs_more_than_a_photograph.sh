#!/usr/bin/env bash
# To Idefics3 and SmolVLM an icon of 32 pixels costs more than a photograph of 12 megapixels: size saves nothing.
#
# Versions: transformers 5.24.0, pillow 13.0.0, numpy 2.4.6 (the processor's PIL version, no torch).
# Behaviour: every picture is first brought to a long side of 1456 pixels, small ones by enlarging them, and then cut
#   into tiles of 364. So the aspect ratio alone decides how many tiles the encoder sees: 16 of a square and one view
#   of the whole, 12 and one of 4:3, 4 and one of a line of text.
# Output: tiles of 32 x 32 17, 364 x 364 17, 1456 x 1456 17, 64 x 48 13, 4000 x 3000 13, 1000 x 100 5.
# Wrong guess: tiles are cut from large pictures, a small one is a single tile, and whoever shrinks pictures before
#   asking, to meet a deadline, makes the answer faster. A smaller longest_edge in `size` does that: 32 x 32 is 1 tile
#   with 364.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check numpy==2.4.6 pillow==13.0.0 transformers==5.24.0
cat > "$dir/tiles.py" <<'EOF'
from PIL import Image
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

SIZES = ((32, 32), (364, 364), (1456, 1456), (64, 48), (4000, 3000), (1000, 100))


def tiles(width, height, **options):
    """Count the tiles that the encoder sees of an image."""
    made = Idefics3ImageProcessorPil(**options)(images=[Image.new("RGB", (width, height))], return_tensors="np")
    return made.pixel_values.shape[1]


found = {size: tiles(*size) for size in SIZES}
for (width, height), count in found.items():
    print(f"{width} x {height}: {count} tiles")
print("32 x 32 with longest_edge 364:", tiles(32, 32, size={"longest_edge": 364}))
assert found[32, 32] == found[364, 364] == found[1456, 1456], "the size of a square matters"
assert found[32, 32] > found[4000, 3000] == found[64, 48] > found[1000, 100], "the shape alone does not decide"
assert tiles(32, 32, size={"longest_edge": 364}) < found[32, 32], "a smaller longest_edge saves nothing"
EOF
"$dir/venv/bin/python" "$dir/tiles.py"
