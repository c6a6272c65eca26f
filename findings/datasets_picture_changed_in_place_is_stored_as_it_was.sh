#!/usr/bin/env bash
# A picture that was opened and then drawn on, or shrunk in place, enters a data set of `datasets` as it lies on the disk.
#
# Versions: datasets 5.2.0, pillow 13.0.0.
# Behaviour: of a PIL picture that has a file's name, the name is stored and the pixels are not looked at. Pictures that
#   are opened keep it through whatever works in place: drawing, paste, putpixel, thumbnail. resize, crop and convert
#   return new pictures without a name, whose pixels are stored.
# Output: a white file, opened and painted black, is white again; thumbnail((8, 8)) of 64 x 64 is 64 x 64 again,
#   resize((8, 8)) is 8 x 8.
# Wrong guess: what is stored are the pixels that one sees. A box drawn around the object in question, blacked-out faces
#   or a smaller size are lost, with scores that look plausible.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check datasets==5.2.0 pillow==13.0.0
cd "$dir"
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - <<'EOF'
from datasets import Dataset, Features
from datasets import Image as Picture
from PIL import Image, ImageDraw

Image.new("RGB", (64, 64), "white").save("white.png")


def stored(picture):
    """The picture as a data set returns it."""
    return Dataset.from_dict({"image": [picture]}, features=Features({"image": Picture()}))[0]["image"]


painted = Image.open("white.png")
ImageDraw.Draw(painted).rectangle((0, 0, 63, 63), fill="black")
shrunk = Image.open("white.png")
shrunk.thumbnail((8, 8))
resized = Image.open("white.png").resize((8, 8))
print("painted", painted.getpixel((9, 9)), "->", stored(painted).getpixel((9, 9)))
print("thumbnail", shrunk.size, "->", stored(shrunk).size, "| resize", resized.size, "->", stored(resized).size)
assert painted.getpixel((9, 9)) == (0, 0, 0) and stored(painted).getpixel((9, 9)) == (255, 255, 255), "paint stays"
assert shrunk.size == (8, 8) and stored(shrunk).size == (64, 64), "the smaller size stays"
assert stored(resized).size == (8, 8), "a new picture is not stored"
EOF
