#!/usr/bin/env bash
# In the COCO caption scores a price in euros equals the same price in dollars, and a pound sign is a number sign.
#
# Versions: pycocoevalcap 1.2 (Stanford CoreNLP 3.4.1 inside). Needs a Java runtime: apt-get install default-jre-headless
# Behaviour: the Java tokenizer maps money to the signs that the Penn Treebank has: the euro to $, the pound to #. The yen
#   stays. Dashes of every length are dropped, and a half written as one character becomes 1/2.
# Output: "€20" -> "$ 20", "£20" -> "# 20", "¥20" -> "¥ 20", "½" -> "1/2".
# Wrong guess: a tokenizer splits text and leaves its characters alone, so that a caption with another currency is wrong.
set -euo pipefail
command -v java >/dev/null || { echo "needs java: apt-get install default-jre-headless" >&2; exit 2; }
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check --no-deps pycocoevalcap==1.2
"$dir/venv/bin/python" - <<'EOF'
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

expected = {"€20": "$ 20", "£20": "# 20", "¥20": "¥ 20", "½": "1/2"}
words = PTBTokenizer().tokenize({index: [{"caption": f"about {line} of it"}] for index, line in enumerate(expected)})
for index, (line, tokens) in enumerate(expected.items()):
    print(repr(line), "->", repr(words[index][0]))
    assert words[index] == [f"about {tokens} of it"], f"{line} is written otherwise"
EOF
