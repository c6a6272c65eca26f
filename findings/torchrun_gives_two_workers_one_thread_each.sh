#!/usr/bin/env bash
# torchrun with two workers gives each of them one CPU thread, however many cores there are; with one worker, all.
#
# Versions: torch 2.13.0 (CPU).
# Behaviour: with more than one process a node and OMP_NUM_THREADS unset, torchrun sets it to 1 for the workers. What
#   prepares pictures on the CPU beside a GPU then runs on one core, so that two GPUs are less than twice one.
# Output: 1 worker: OMP_NUM_THREADS unset; 2 workers: OMP_NUM_THREADS 1, torch.get_num_threads() 1.
# Wrong guess: cores are divided among the workers, or left alone as in a run with one worker.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/say.py" <<'EOF'
import os

import torch

print("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS"), "threads", torch.get_num_threads(), flush=True)
EOF
unset OMP_NUM_THREADS
run() { "$dir/venv/bin/torchrun" --standalone --nproc_per_node "$1" "$dir/say.py" 2>/dev/null; }
one=$(run 1)
two=$(run 2)
printf 'one worker:\n%s\ntwo workers:\n%s\n' "$one" "$two"
grep -q 'OMP_NUM_THREADS None' <<<"$one" || { echo "one worker is given a number of threads" >&2; exit 1; }
[ "$(grep -c 'OMP_NUM_THREADS 1 threads 1' <<<"$two")" == 2 ] || { echo "two workers are not given one thread" >&2; exit 1; }
