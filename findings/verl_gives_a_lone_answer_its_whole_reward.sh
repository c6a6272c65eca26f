#!/usr/bin/env bash
# verl's GRPO praises an answer that has no group: its advantage is its whole reward; in a group of equals it is 0.
#
# Versions: verl 0.9.1 (its function alone), torch 2.13.0 (CPU), numpy 2.4.6.
# Behaviour: a group of one gets the mean 0 and the spread 1 in place of its own, so that its advantage is the raw
#   reward. Groups of one come of rollout.n=1, and of answers that were filtered out before.
# Output: rewards and advantages: [0.9, 0.1] 0.71 and -0.71; [0.5, 0.5] 0 and 0; [0.9] alone 0.9; [50] alone 50.
# Wrong guess: with nobody to compare with there is nothing to learn, as in a group of equals; trl refuses such groups.
#   With rewards above 0 every lone answer is made likelier, right or wrong, and one on a scale of 100 outweighs all.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$dir/venv/bin/pip" install -q --disable-pip-version-check --no-deps verl==0.9.1
"$dir/venv/bin/python" - <<'EOF'
import ast
import sysconfig
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

path = Path(sysconfig.get_paths()["purelib"]) / "verl/trainer/ppo/core_algos.py"
NAME = "compute_grpo_outcome_advantage"
wanted = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", None) == NAME]
for node in wanted:
    node.decorator_list = []  # they enter the function in a registry
names = {"torch": torch, "np": np, "defaultdict": defaultdict}
flags = __import__("__future__").annotations.compiler_flag  # its types come from packages that are not needed here
exec(compile(ast.Module(wanted, []), path, "exec", flags), names)


def advantages(rewards, groups):
    """Advantages of answers of one token."""
    rewards = torch.tensor(rewards)[:, None]
    found, _ = names[NAME](rewards, torch.ones_like(rewards), np.array(groups, dtype=object))
    return [round(value, 3) for value in found[:, 0].tolist()]


*found, alone, large = advantages([0.9, 0.1, 0.5, 0.5, 0.9, 50.0], list("aabbcd"))
apart, equal = found[:2], found[2:]
print("0.9 and 0.1:", apart, "| 0.5 and 0.5:", equal, "| 0.9 alone:", alone, "| 50 alone:", large)
assert abs(apart[0] - 0.707) < 0.01 and equal == [0.0, 0.0], "groups of two are scored otherwise"
assert alone == 0.9 and large == 50.0, "an answer without a group is not given its reward"
EOF
