#!/usr/bin/env bash
# Two matplotlib figures written as SVG and put into one HTML page share ids, whatever svg.hashsalt says.
#
# Version: matplotlib 3.10.7.
# Behaviour: svg.hashsalt makes the ids of clip paths and markers repeat from run to run; groups are numbered anew in
#   every figure (figure_1, axes_1, line2d_1), and equal clip rectangles hash to equal ids. A page that inlines
#   several plots, as reports that must be one file do, has every such id several times.
# Output: 75 ids in common, axes_1, line2d_1 and those of glyphs among them.
# Wrong guess: hashed ids are unique, so inlined figures can be styled or referred to one by one.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check matplotlib==3.10.7
MPLBACKEND=svg MPLCONFIGDIR="$dir" "$dir/venv/bin/python" - <<'EOF'
import io
import re

import matplotlib
from matplotlib import pyplot

matplotlib.rcParams["svg.hashsalt"] = "page"
ids = []
for values in ([1, 2, 3], [3, 1, 2]):
    figure, axes = pyplot.subplots()
    axes.plot(values)
    text = io.StringIO()
    figure.savefig(text, format="svg")
    ids.append(set(re.findall(r'\bid="([^"]+)"', text.getvalue())))
common = ids[0] & ids[1]
print(len(common), sorted(common)[:6])
assert {"axes_1", "line2d_1"} <= common, "groups have ids of their own"
assert len(common) >= 20, "most ids are a figure's own"
EOF
