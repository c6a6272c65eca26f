#!/usr/bin/env bash
# DocVQA's score of a wrong answer rises with the blanks and line ends after it: "cat" for "dog" is worth nearly 1.
#
# Versions: lmms-eval 0.7.3 (its scoring function alone), anls_star 1.0.1.
# Behaviour: ANLS is 1 less edits over length, or 0 below one half. Edits are counted between the stripped texts, with
#   runs of blanks made one; the length is that of the longer text as it came. Blanks cost nothing and make the edits
#   look few. anls_star measures both on the stripped text.
# Output: lmms-eval and anls_star, where the answer is "dog": "cat" 0 0, "cat" and four line ends 0.571 0, "cat" and 300
#   blanks 0.99 0, "dog" and four line ends 1 1.
# Wrong guess: blanks around an answer do not count, so that models compare whether or not their answers end with line
#   ends, or run into them up to the token limit; and two packages that compute ANLS agree.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check --no-deps lmms-eval==0.7.3
"$dir/venv/bin/pip" install -q --disable-pip-version-check --no-deps anls_star==1.0.1 munkres==1.1.4
cd "$dir"
"$dir/venv/bin/python" - <<'EOF'
import ast
import sysconfig
from pathlib import Path

from anls_star import anls_score

path = Path(sysconfig.get_paths()["purelib"]) / "lmms_eval/api/metrics.py"
names = {"anls", "levenshtein_distance"}
wanted = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", None) in names]
for node in wanted:
    node.decorator_list = []  # they enter the function in a registry that imports torch
scorer = {}
exec(compile(ast.Module(wanted, []), path, "exec"), scorer)

ends = "\n" * 4
expected = {"cat": (0, 0), f"cat{ends}": (4 / 7, 0), "cat" + " " * 300: (1 - 3 / 303, 0), f"dog{ends}": (1, 1)}
for reply, right in expected.items():
    found = scorer["anls"](["dog"], [reply])["anls"], anls_score("dog", reply)
    print(repr(reply[:7]), len(reply), *(round(value, 3) for value in found))
    assert all(abs(a - b) < 1e-6 for a, b in zip(found, right)), f"{reply!r} is scored otherwise"
EOF
