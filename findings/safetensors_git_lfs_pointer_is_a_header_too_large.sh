#!/usr/bin/env bash
# A Git LFS pointer in place of weights is reported as "header too large", by safetensors and by torch.load alike.
#
# Versions: safetensors 0.8.0, torch 2.13.0 (CPU).
# Behaviour: a clone without LFS leaves a text of 130 bytes under the weights' name. Its first eight characters are read as
#   the length of a header. torch.load hands a file by its suffix to safetensors, so its own message about pickles, which
#   one would search for, does not come.
# Output: SafetensorError: ... header too large, twice.
# Wrong guess: the message says that the file is no safetensors file, or is too short; "header too large" sounds like a
#   limit that some option lifts, or like damage.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$dir/venv/bin/pip" install -q --disable-pip-version-check safetensors==0.8.0
cd "$dir"
"$dir/venv/bin/python" - <<'EOF'
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

file = Path("model.safetensors")
file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 14000000000\n")
for opener in (lambda: safe_open(file, "pt"), lambda: torch.load(file)):
    try:
        opener()
        raise AssertionError("the pointer is opened")
    except SafetensorError as error:
        print("SafetensorError:", error)
        assert "header too large" in str(error), "it says something else"
EOF
