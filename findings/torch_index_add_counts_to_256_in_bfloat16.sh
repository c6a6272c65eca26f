#!/usr/bin/env bash
# Counted with index_add_ in bfloat16, an expert never has more than 256 tokens; with scatter_add_ it has all 300.
#
# Versions: torch 2.13.0 (CPU).
# Behaviour: index_add_ on a vector adds one element after the other and rounds each sum to the vector's type; from 256
#   on, one more is no more than half a step. scatter_add_ and sum keep more digits until the end, and so does
#   index_add_ on rows, as where the experts' outputs come together. float16 stops at 2048.
# Output: 300 ones: index_add_ 256, scatter_add_ 300, sum 300, index_add_ of rows 300; 4096 ones in float16: index_add_
#   2048, scatter_add_ 4096.
# Wrong guess: index_add_ and scatter_add_ are two ways to write the same sum. A balancing loss of the tokens of each
#   expert then takes the busiest experts for equally loaded.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$dir/venv/bin/python" - <<'EOF'
import torch


def sums(count, dtype):
    """The sum of `count` ones for the first of two experts, made in four ways."""
    expert, ones = torch.zeros(count, dtype=torch.long), torch.ones(count, dtype=dtype)
    return {
        "index_add_": torch.zeros(2, dtype=dtype).index_add_(0, expert, ones)[0].item(),
        "scatter_add_": torch.zeros(2, dtype=dtype).scatter_add_(0, expert, ones)[0].item(),
        "sum": ones.sum().item(),
        "rows": torch.zeros(2, 4, dtype=dtype).index_add_(0, expert, ones[:, None].expand(-1, 4))[0, 0].item(),
    }


brain, half = sums(300, torch.bfloat16), sums(4096, torch.float16)
print("300 in bfloat16:", brain, "| 4096 in float16:", half)
assert brain["index_add_"] == 256 and half["index_add_"] == 2048, "index_add_ counts on"
assert brain["scatter_add_"] == brain["sum"] == 300 and half["scatter_add_"] == 4096, "the others stop too"
EOF
