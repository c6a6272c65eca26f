#!/usr/bin/env bash
# In TextVQA, OK-VQA and VizWiz a model that says nothing has read the letter A: an empty reply scores 1 there.
#
# Versions: lmms-eval 0.7.3 (its scoring functions alone).
# Behaviour: answers and replies are normalised before they are compared, as in the official evaluation, which drops
#   articles. "A", "a", "an", "the" and "?" all become the empty text.
# Output: where ten people read "A": replies "A", "", "the" and "?" score 1, "B" 0; where they read "B": "B" 1, "" 0.
# Wrong guess: no reply is never right, so that a model that breaks off early, or is cut at its deadline before the
#   first token, can only lose. Questions for a letter, a grade or a blood group pay for it.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check --no-deps lmms-eval==0.7.3
cd "$dir"
"$dir/venv/bin/python" -W ignore - <<'EOF'
import ast
import statistics
import sysconfig
from pathlib import Path

tasks = Path(sysconfig.get_paths()["purelib"]) / "lmms_eval/tasks"
names = {"statistics": statistics}
exec(compile((tasks / "_task_utils/vqa_eval_metric.py").read_text(), "vqa_eval_metric.py", "exec"), names)
scorers = {}
for task in ("textvqa", "ok_vqa", "vizwiz_vqa"):
    path, name = tasks / task / "utils.py", f"{task}_process_results"
    wanted = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", None) == name]
    exec(compile(ast.Module(wanted, []), path, "exec"), names)
    scorers[task] = names[name]

expected = {("A", "A"): 1, ("A", ""): 1, ("A", "the"): 1, ("A", "?"): 1, ("A", "B"): 0, ("B", "B"): 1, ("B", ""): 0}
for (right, reply), score in expected.items():
    found = {}
    for task, run in scorers.items():
        found[task] = run({"question_id": 1, "answers": [right] * 10}, [reply])["exact_match"]
    print(f"{right!r} was read, reply {reply!r}:", found)
    assert all(value == score for value in found.values()), f"{reply!r} for {right!r} is scored otherwise"
EOF
