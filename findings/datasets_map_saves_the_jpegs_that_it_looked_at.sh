#!/usr/bin/env bash
# A map() of `datasets` that only asks a JPEG for its width stores another picture: compressed once more, at quality 75.
#
# Versions: datasets 5.2.0, pillow 13.0.0, numpy 2.4.6.
# Behaviour: a picture that the function reads is decoded, and the decoded one is written, in its first format with
#   Pillow's default quality, also where the function returns other columns alone. A function that does not read the
#   column leaves its bytes, and filter() leaves them in any case; a PNG keeps its pixels.
# Output: mean change of a pixel's value out of 255, noise saved at quality 95: after filter 0.0, after a map that reads
#   the question 0.0, after one that reads the picture's width 13.2, with about half the bytes.
# Wrong guess: a column that is not returned stays as it is, and a picture that nobody changed is stored without loss. A
#   set that got a column so has other small print than the one that the published scores come from.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check datasets==5.2.0 pillow==13.0.0 numpy==2.4.6
cd "$dir"
HF_HUB_OFFLINE=1 HF_HOME="$dir/home" "$dir/venv/bin/python" - <<'EOF' 2>/dev/null
import io

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Image as Picture
from PIL import Image


def loaded(kind):
    """A data set of one picture of noise and a question about it."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind, quality=95)
    row = {"image": {"bytes": file.getvalue(), "path": None}, "question": "what is this?"}
    return Dataset.from_list([row], features=Features({"image": Picture(), "question": Value("string")}))


def pixels(rows):
    return np.asarray(rows[0]["image"], dtype=np.float64)


def size(rows):
    return len(rows.with_format("arrow")[0]["image"][0].as_py()["bytes"])


def add_width(row):
    return {"width": row["image"].width}


jpeg, png = loaded("JPEG"), loaded("PNG")
found = {
    "filter": jpeg.filter(lambda row: row["image"].width > 1),
    "map reads the question": jpeg.map(lambda row: {"length": len(row["question"])}),
    "map reads the picture": jpeg.map(add_width),
}
changes = {name: float(np.abs(pixels(rows) - pixels(jpeg)).mean()) for name, rows in found.items()}
print(*(f"{name}: {change:.1f}, {size(found[name])} of {size(jpeg)} bytes;" for name, change in changes.items()))
last = changes.pop("map reads the picture")
assert all(change == 0 and size(found[name]) == size(jpeg) for name, change in changes.items()), "unread pictures change"
assert last > 5 and size(found["map reads the picture"]) < 0.8 * size(jpeg), "a picture that is read stays as it was"
assert (pixels(png.map(add_width)) == pixels(png)).all(), "a PNG changes too"
EOF
