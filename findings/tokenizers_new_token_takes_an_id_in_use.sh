#!/usr/bin/env bash
# A token that is added to a vocabulary with a gap in its ids takes the id of a word that is there.
#
# Versions: tokenizers 0.23.3.
# Behaviour: the next id is the number of tokens, not the highest id plus one. Vocabularies with gaps are common where an
#   embedding was padded or control tokens sit at its end. The word whose id was taken encodes as before, but decodes as
#   the new token, and skip_special_tokens drops it from answers.
# Output: ids [UNK] 0, red 1, bus 3; <image> is added and gets 3; "red bus" encodes to [1, 3] and decodes to "red".
# Wrong guess: adding a token never touches the tokens that are there; get_vocab_size() is the size that an embedding needs.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check tokenizers==0.23.3
"$dir/venv/bin/python" - <<'EOF'
from tokenizers import Tokenizer, models, pre_tokenizers

tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "red": 1, "bus": 3}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
before = tokenizer.decode(tokenizer.encode("red bus").ids)
size = tokenizer.get_vocab_size()
tokenizer.add_special_tokens(["<image>"])
ids = tokenizer.encode("red bus").ids
print("size", size, "| new id", tokenizer.token_to_id("<image>"), "| ids", ids, "| before", before, "| after",
      tokenizer.decode(ids))
assert size == 3 and tokenizer.token_to_id("<image>") == 3, "the new token has an id of its own"
assert before == "red bus" and ids == [1, 3] and tokenizer.decode(ids) == "red", "the word is still there"
EOF
