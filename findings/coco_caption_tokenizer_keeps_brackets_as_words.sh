#!/usr/bin/env bash
# The tokenizer of the COCO caption scores means to drop punctuation, but brackets and doubled marks stay as words.
#
# Versions: pycocoevalcap 1.2 (Stanford CoreNLP 3.4.1 inside). Needs a Java runtime: apt-get install default-jre-headless
# Behaviour: brackets come out of Java as -lrb- and -rrb-, since it is told to write lower case, and the list of marks to
#   drop holds -LRB- and -RRB- in upper case. The list also holds "!" and "?" but neither "!!" nor "?!".
# Output: "a man (left) waves!!" -> "a man -lrb- left -rrb- waves !!", where "a man left waves !" loses its mark.
# Wrong guess: brackets and exclamation marks never count in BLEU, METEOR, ROUGE and CIDEr.
set -euo pipefail
command -v java >/dev/null || { echo "needs java: apt-get install default-jre-headless" >&2; exit 2; }
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check --no-deps pycocoevalcap==1.2
"$dir/venv/bin/python" - <<'EOF'
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

lines = ["a man (left) waves!!", "a man left waves!", "really?!"]
words = PTBTokenizer().tokenize({index: [{"caption": line}] for index, line in enumerate(lines)})
for index, line in enumerate(lines):
    print(repr(line), "->", repr(words[index][0]))
assert words[0] == ["a man -lrb- left -rrb- waves !!"], "brackets or doubled marks are dropped"
assert words[1] == ["a man left waves"], "a single mark is kept"
assert words[2] == ["really ?!"], "?! is dropped"
EOF
