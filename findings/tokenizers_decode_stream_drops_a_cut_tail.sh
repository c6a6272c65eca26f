#!/usr/bin/env bash
# The joined steps of a DecodeStream are not the decoded text where an answer is cut within a character.
#
# Versions: tokenizers 0.23.3.
# Behaviour: bytes of an unfinished character are held back until it is whole. There is no call that ends the stream, so
#   an answer whose token limit falls there loses what decode() shows as U+FFFD.
# Output: "5€" less its last token: the stream says "5", decode says "5" and U+FFFD.
# Wrong guess: a client that joins the pieces of a stream has the text of the plain answer, and the two can be compared,
#   cached and scored as one.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check tokenizers==0.23.3
"$dir/venv/bin/python" - <<'EOF'
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.decoders import DecodeStream

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
ids = tokenizer.encode("5€").ids[:-1]
stream = DecodeStream()
joined = "".join(stream.step(tokenizer, token) or "" for token in ids)
print("stream", ascii(joined), "| decode", ascii(tokenizer.decode(ids)))
assert joined == "5" and tokenizer.decode(ids) == "5\ufffd", "stream and decode agree"
assert not hasattr(stream, "flush") and not hasattr(stream, "finish"), "the stream can be ended"
EOF
