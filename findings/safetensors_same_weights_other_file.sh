#!/usr/bin/env bash
# Weights saved twice with safetensors are two different files if their metadata has two entries or more.
#
# Versions: safetensors 0.8.0, numpy 2.4.6.
# Behaviour: the entries of __metadata__ are written in the order of a hash map that is seeded anew for each call.
#   Tensors have a fixed order, and one entry has only one. Sizes and tensors are equal, the file's bytes are not.
# Output: 20 saves of the same two tensors: with one entry of metadata 1 digest, with six entries about 20.
# Wrong guess: equal tensors and equal metadata make equal bytes, so the file's digest can name the weights: in a cache,
#   in a stamp of results, or to see whether a conversion can be repeated.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
"$dir/venv/bin/python" - <<'EOF'
import hashlib
import json

import numpy as np
from safetensors.numpy import save

tensors = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float16)}
few = {"format": "pt"}
many = few | {"model": "m", "commit": "c", "data": "d", "license": "l", "steps": "100"}
LENGTH = 8


def digests(metadata):
    """The digests of 20 saves, after a look whether each of them says the same."""
    files = [save(tensors, metadata) for _ in range(20)]
    headers = [json.loads(one[LENGTH : LENGTH + int.from_bytes(one[:LENGTH], "little")]) for one in files]
    assert all(header == headers[0] for header in headers) and headers[0]["__metadata__"] == metadata
    return {hashlib.sha256(one).hexdigest() for one in files}


one_entry, six_entries = digests(few), digests(many)
print(f"digests of 20 saves: one entry {len(one_entry)}, six entries {len(six_entries)}")
assert len(one_entry) == 1, "tensors have no fixed order"
assert len(six_entries) > 1, "metadata is written in a fixed order"
EOF
