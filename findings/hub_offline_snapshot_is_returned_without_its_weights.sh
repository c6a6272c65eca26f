#!/usr/bin/env bash
# snapshot_download(local_files_only=True) returns a folder whose weights are a dangling link, and one that holds no file
# of the patterns asked for.
#
# Versions: huggingface_hub 2.4.0.
# Behaviour: without a network the function looks up which commit the branch names and returns that folder if it exists.
#   Neither links into blobs/ nor allow_patterns are looked at. hf_hub_download of the same file does raise.
# Output: a path twice; hf_hub_download: LocalEntryNotFoundError.
# Wrong guess: what a download function returns has been checked to be there, so a model loader may open it unlooked.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check huggingface_hub==2.4.0
cd "$dir"
"$dir/venv/bin/python" - <<'EOF'
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

commit = "a" * 40
repo = Path("cache/models--acme--tiny").resolve()
snapshot = repo / "snapshots" / commit
for folder in (snapshot, repo / "refs", repo / "blobs"):
    folder.mkdir(parents=True)
(repo / "refs/main").write_text(commit)
(repo / "blobs/config").write_text("{}")
(snapshot / "config.json").symlink_to("../../blobs/config")
(snapshot / "model.safetensors").symlink_to("../../blobs/weights-that-were-pruned")

whole = Path(snapshot_download("acme/tiny", cache_dir="cache", local_files_only=True))
none = snapshot_download("acme/tiny", cache_dir="cache", local_files_only=True, allow_patterns=["*.gguf"])
weights = whole / "model.safetensors"
print("returned", whole.name[:8], "| weights exist:", weights.exists(), "| asked for *.gguf:", Path(none).name[:8])
assert weights.is_symlink() and not weights.exists() and not list(Path(none).glob("*.gguf"))
try:
    hf_hub_download("acme/tiny", "model.safetensors", cache_dir="cache", local_files_only=True)
    raise AssertionError("the single file is returned too")
except LocalEntryNotFoundError as error:
    print("hf_hub_download:", type(error).__name__)
EOF
