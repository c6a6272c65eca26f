#!/usr/bin/env bash
# For a string whose pattern is yes|no, outlines-core allows a yes with one quote before it and a no with one behind it.
#
# Versions: outlines-core 0.2.14, llguidance 1.9.1, jsonschema 4.26.0.
# Behaviour: the regular expression of a string is a quote, the pattern and a quote, with nothing that holds the pattern
#   together. A choice at its top level splits the quotes too: ("yes|no"). Of ^yes|no$ the first and the last character
#   are cut off, which gives the same. A choice in brackets is right. llguidance, which reads the same schemas, allows
#   the whole strings, as jsonschema does.
# Output: which of '"yes"', '"no"', '"yes' and 'no"' are allowed. yes|no and ^yes|no$: outlines-core the last two, which
#   are no JSON, llguidance the first two; ^(yes|no)$: both libraries the first two.
# Wrong guess: whatever a schema makes of an answer, it is JSON. Here every answer that keeps to the grammar fails in
#   json.loads, and the answers that keep to the schema are those that the model is not able to write.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check outlines-core==0.2.14 llguidance==1.9.1 jsonschema==4.26.0
"$dir/venv/bin/python" - <<'EOF'
import json
import re

import jsonschema
from llguidance import LLMatcher, LLTokenizer
from outlines_core.json_schema import build_regex_from_schema

TEXTS = '"yes"', '"no"', '"yes', 'no"'
BYTES = LLTokenizer("byte")


def valid(schema, text):
    """Whether the text is JSON and keeps to the schema."""
    try:
        jsonschema.validate(json.loads(text), schema)
    except json.JSONDecodeError:
        return False
    return True


def outlines_allows(schema, text):
    return re.fullmatch(build_regex_from_schema(json.dumps(schema)), text) is not None


def llguidance_allows(schema, text):
    matcher = LLMatcher(BYTES, LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    tokens = BYTES.tokenize_str(text)
    return matcher.validate_tokens(tokens) == len(tokens) and matcher.consume_tokens(tokens) and matcher.is_accepting()


def allowed(pattern, judge):
    """Which of TEXTS are allowed for a string of this pattern."""
    return [text for text in TEXTS if judge({"type": "string", "pattern": pattern}, text)]


WHOLE, HALVES = list(TEXTS[:2]), list(TEXTS[2:])
for pattern, expected in {"yes|no": HALVES, "^yes|no$": HALVES, "^(yes|no)$": WHOLE}.items():
    found = allowed(pattern, outlines_allows)
    print(f"{pattern}: outlines-core allows {found}, llguidance {allowed(pattern, llguidance_allows)}")
    assert allowed(pattern, valid) == WHOLE, f"{pattern}: other strings keep to the schema"
    assert allowed(pattern, llguidance_allows) == WHOLE, f"{pattern}: llguidance allows others"
    assert found == expected, f"{pattern}: outlines-core allows others"
EOF
