#!/usr/bin/env bash
# A model that satisfies a runtime-checkable protocol on Python 3.11 does not on 3.12, if the protocol names a submodule.
#
# Versions: torch 2.13.0 on Python 3.11 and 3.12.
# Behaviour: torch.nn.Module keeps submodules and parameters in dictionaries and finds them in __getattr__. From Python
#   3.12 on, isinstance with a protocol looks members up statically, without __getattr__, so it does not see them;
#   methods and plain attributes are seen as before.
# Output: 3.11: True True; 3.12: False True (a protocol that names the submodule; one that names a method).
# Wrong guess: hasattr(model, "decoder") is True, so isinstance(model, HasDecoder) is too, on every Python.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cat > "$dir/check.py" <<'EOF'
import sys
from typing import Protocol, runtime_checkable

import torch


@runtime_checkable
class HasDecoder(Protocol):
    decoder: torch.nn.Module


@runtime_checkable
class Reads(Protocol):
    def read(self) -> int: ...


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = torch.nn.Linear(2, 2)

    def read(self) -> int:
        return 1


model = Model()
assert hasattr(model, "decoder")
seen = isinstance(model, HasDecoder), isinstance(model, Reads)
print(".".join(map(str, sys.version_info[:2])), *seen)
assert seen == (sys.version_info < (3, 12), True), "protocols and torch modules agree differently now"
EOF
for version in 3.11 3.12; do
  python=$(command -v "python$version") || { echo "needs python$version on the PATH" >&2; exit 2; }
  "$python" -m venv "$dir/$version"
  "$dir/$version/bin/pip" install -q --disable-pip-version-check torch==2.13.0
  "$dir/$version/bin/python" "$dir/check.py"
done
