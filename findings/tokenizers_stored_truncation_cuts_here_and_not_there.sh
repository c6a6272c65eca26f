#!/usr/bin/env bash
# One tokenizer.json gives two tokens or four for the same text, depending on which library loads it.
#
# Versions: tokenizers 0.23.3, transformers 5.24.0.
# Behaviour: truncation that was on when the file was saved is stored in it. tokenizers applies it to every encode() after
#   loading; transformers switches it off at every call unless told otherwise.
# Output: tokenizers [1, 2], transformers [1, 2, 1, 2].
# Wrong guess: a tokenizer's file holds how text is split, and how long it may be is said by the caller. A prompt loses its
#   end, which is where the question stands, without a word.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check tokenizers==0.23.3 transformers==5.24.0
cd "$dir"
"$dir/venv/bin/python" - <<'EOF' 2>/dev/null
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

trained = Tokenizer(models.WordLevel({"[UNK]": 0, "red": 1, "bus": 2}, unk_token="[UNK]"))
trained.pre_tokenizer = pre_tokenizers.Whitespace()
trained.enable_truncation(2)
trained.save("tokenizer.json")
text = "red bus red bus"
here = Tokenizer.from_file("tokenizer.json").encode(text).ids
there = PreTrainedTokenizerFast(tokenizer_file="tokenizer.json", unk_token="[UNK]")(text).input_ids
print("tokenizers", here, "| transformers", there)
assert here == [1, 2] and there == [1, 2, 1, 2], "both read it alike"
EOF
