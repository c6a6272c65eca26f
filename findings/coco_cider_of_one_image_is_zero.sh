#!/usr/bin/env bash
# CIDEr of a perfect caption is 0 when one image is scored, and 10 when two are.
#
# Versions: pycocoevalcap 1.2, numpy 2.4.6 (no Java is needed for this part of it).
# Behaviour: words are weighted by the logarithm of images over images that have the word, counted on the references
#   that are scored together. With one image every weight is log(1) = 0; with two images of one and the same caption too.
# Output: one image 0.0, two alike 0.0, two unlike 10.0.
# Wrong guess: a caption equal to its reference has the highest score, whatever else is scored beside it; so a mean of
#   scores of single images, or a test with one image, says something.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check numpy==2.4.6
"$dir/venv/bin/pip" install -q --disable-pip-version-check --no-deps pycocoevalcap==1.2
"$dir/venv/bin/python" - <<'EOF'
from pycocoevalcap.cider.cider import Cider

bus, dogs = "a red bus on the street", "two dogs play in snow"


def score(*captions):
    """Score captions against themselves."""
    pairs = {index: [caption] for index, caption in enumerate(captions)}
    return float(Cider().compute_score(pairs, pairs)[0])


one, alike, unlike = score(bus), score(bus, bus), score(bus, dogs)
print("one image", one, "two alike", alike, "two unlike", unlike)
assert abs(one) < 1e-9 and abs(alike) < 1e-9, "a lone image has a score"
assert abs(unlike - 10) < 1e-6, "two different images are scored differently from 10"
EOF
