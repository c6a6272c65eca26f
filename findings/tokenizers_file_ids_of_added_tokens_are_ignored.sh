#!/usr/bin/env bash
# The ids that a tokenizer.json gives its added tokens are not the ids that they get.
#
# Versions: tokenizers 0.23.3.
# Behaviour: added tokens are numbered on from the vocabulary's length in the order of the file; the field "id" is read and
#   then ignored, without an error or a warning.
# Output: the file says <image> 100, the tokenizer says 3.
# Wrong guess: an id written in the file is the id of the token, or the file is refused. A control token that was moved by
#   hand, to where a model's embedding has its row, points at another row.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check tokenizers==0.23.3
"$dir/venv/bin/python" - <<'EOF'
import json

from tokenizers import Tokenizer, models

plain = Tokenizer(models.WordLevel({"[UNK]": 0, "red": 1, "bus": 2}, unk_token="[UNK]"))
plain.add_special_tokens(["<image>"])
file = json.loads(plain.to_str())
file["added_tokens"][0]["id"] = 100
loaded = Tokenizer.from_str(json.dumps(file))
print("the file says", file["added_tokens"][0]["id"], "| the tokenizer says", loaded.token_to_id("<image>"))
assert loaded.token_to_id("<image>") == 3 and loaded.id_to_token(100) is None, "the file's id is kept"
EOF
