#!/usr/bin/env bash
# The WordPiece decoder keeps the ## of a continuation piece that comes first, so streamed pieces are not the text.
#
# Version: tokenizers 0.22.1.
# Behaviour: decode() joins a piece that begins with ## to the piece before it; at the beginning there is none, and the
#   marks stay. A stream that decodes token by token therefore shows marks that decoding all tokens never shows.
# Output: decode([play, ##ing]) -> "playing", decode([##ing]) -> "##ing", pieces joined -> "play##ing".
# Wrong guess: a decoder takes the marks off every piece, so decoded pieces can be joined.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check tokenizers==0.22.1
"$dir/venv/bin/python" - <<'EOF'
from tokenizers import Tokenizer, decoders, models

tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
tokenizer.decoder = decoders.WordPiece()
whole, pieces = tokenizer.decode([1, 2]), [tokenizer.decode([i]) for i in (1, 2)]
print(repr(whole), pieces)
assert whole == "playing"
assert pieces == ["play", "##ing"], "the marks of a first piece are taken off"
EOF
