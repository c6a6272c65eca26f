#!/usr/bin/env bash
# Rows after the last offset of torch's grouped_mm hold what was in memory before, not zeros.
#
# Versions: torch 2.13.0 (CPU).
# Behaviour: torch.nn.functional.grouped_mm(a, b, offs=...) multiplies the rows up to the last offset and allocates the
#   result without filling it: rows past it are never written. A mixture of experts that pads its tokens (static
#   shapes, dropped tokens) adds garbage, which is often the previous step's plausible values.
# Output: with 10 rows and offsets [3, 6], rows 6 to 9 of the results hold up to hundreds of values other than 0.
# Wrong guess: rows that belong to no group come out as zeros, as an empty product would.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/tail.py" <<'EOF'
import torch

rows, width = 10, 8
a = torch.ones(rows, width, dtype=torch.bfloat16)
b = torch.ones(2, width, width, dtype=torch.bfloat16)
offs = torch.tensor([3, 6], dtype=torch.int32)
seen = 0
for value in (7.0, 5.0, 3.0) * 5:
    torch.full((rows, width), value, dtype=torch.bfloat16)  # freed at once: its memory is the next result's
    out = torch.nn.functional.grouped_mm(a, b, offs=offs)
    assert (out[:6] == width).all(), "the groups' own rows are wrong"
    seen += int((out[6:] != 0).sum())
print("values other than 0 in the rows of no group:", seen)
assert seen, "rows past the last offset are zeros"
EOF
"$dir/venv/bin/python" "$dir/tail.py"
