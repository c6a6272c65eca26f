#!/usr/bin/env bash
# lmms-eval's ScienceQA gives 0 to the right option's own text, to "(B)", to "B)" and to "The answer is B."
#
# Versions: lmms-eval 0.7.3 (its scoring function alone; nothing else of it is needed).
# Behaviour: a reply is right if it is the letter, or if it begins with the letter in upper case and a dot. Nothing
#   else is searched for, and the options' texts are not compared.
# Output: "B" 1, "b" 1, "B. fridge" 1; "fridge", "(B)", "B) fridge", "B: fridge", "The answer is B." 0.
# Wrong guess: a multiple-choice score finds the stated letter, as ScienceQA's own program does for "The answer is B.",
#   or accepts the option's text. A model that is not told to answer by the letter alone measures its obedience here.
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

path = Path(sysconfig.get_paths()["purelib"]) / "lmms_eval/tasks/scienceqa/utils.py"
spec = importlib.util.spec_from_file_location("scienceqa", path)
scienceqa = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scienceqa)
question = {"choices": ["magnet", "fridge", "spoon"], "answer": 1}


def score(reply):
    """Score a reply to a question whose right option is B, fridge."""
    return scienceqa.sqa_process_results(question, [reply])["exact_match"]


right, wrong = ["B", "b", "B. fridge"], ["fridge", "(B)", "B) fridge", "B: fridge", "The answer is B."]
for reply in (*right, *wrong):
    print(repr(reply), score(reply))
assert all(score(reply) > 0.5 for reply in right), "the letter is not enough"
assert all(score(reply) < 0.5 for reply in wrong), "more than the letter is read"
EOF
