#!/usr/bin/env bash
# ChartQA's relaxed score takes 1950 for 2008, and refuses 50 for "50%" and 0.0 for 0.
#
# Versions: lmms-eval 0.7.3 (its scoring function alone; nothing else of it is needed).
# Behaviour: a relative error of 5 % is allowed for whatever reads as a number, years too, where it is a century. "50%" is
#   0.5 while "50" is 50. A reference of 0 counts as no number, so its text must be equal. "1,200" is no number either.
# Output: (1950 for 2008) True, (50 for 50%) False, (0.0 for 0) False, (1,200 for 1200) False.
# Wrong guess: the tolerance is for measured values only, and one value written in two ways is one value.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check --no-deps lmms-eval==0.7.3
cd "$dir"
"$dir/venv/bin/python" - <<'EOF'
import importlib.util
import sysconfig
from pathlib import Path

path = Path(sysconfig.get_paths()["purelib"]) / "lmms_eval/tasks/chartqa/utils.py"
spec = importlib.util.spec_from_file_location("chartqa", path)
chartqa = importlib.util.module_from_spec(spec)
spec.loader.exec_module(chartqa)
expected = {("1950", "2008"): True, ("50", "50%"): False, ("0.0", "0"): False, ("1,200", "1200"): False}
for (reply, reference), right in expected.items():
    found = chartqa.relaxed_correctness(reply, reference)
    print(f"{reply} for {reference}: {found}")
    assert found is right, f"{reply} for {reference} is scored otherwise"
EOF
