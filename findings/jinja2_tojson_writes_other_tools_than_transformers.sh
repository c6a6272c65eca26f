#!/usr/bin/env bash
# The same chat template shows a model other tools if plain Jinja renders it: keys sorted, and < > & ' escaped.
#
# Versions: jinja2 3.1.6, transformers 5.24.0 (no torch).
# Behaviour: Jinja's own filter `tojson` is made for HTML: it sorts keys (policies["json.dumps_kwargs"]) and writes four
#   characters as \u003c, \u003e, \u0026, \u0027, and all that is not ASCII as \u.... transformers puts a filter of the
#   same name in its place, which does neither.
# Output: transformers: {"name": "crop", "description": "keep x < 5 of 'größe' ..."}; Jinja: {"description": "keep x
#   \u003c 5 of \u0027gr\u00f6\u00dfe\u0027 ...", "name": "crop"}. Without tools both render the same text.
# Wrong guess: a template from tokenizer_config.json is the whole format, so any Jinja renders the prompt that a model was
#   trained on. A server with an environment of its own differs in tools alone, is valid JSON, and only calls get worse.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check jinja2==3.1.6 transformers==5.24.0
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - 2>/dev/null <<'EOF'
import json

from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import render_jinja_template

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
messages = [{"role": "user", "content": "what's x < 5?"}]
tools = [{"name": "crop", "description": "keep x < 5 of 'größe' & more"}]
environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)  # as transformers makes its own


def rendered(tools):
    """The prompts of transformers and of plain Jinja."""
    theirs = render_jinja_template(conversations=[messages], tools=tools, chat_template=TEMPLATE)[0][0]
    return theirs, environment.from_string(TEMPLATE).render(messages=messages, tools=tools)


theirs, plain = rendered(tools)
print(theirs.splitlines()[-1])
print(plain.splitlines()[-1])
assert len(set(rendered(None))) == 1, "prompts differ without tools too"
assert '"keep x < 5 of \'größe\' & more"' in theirs and theirs.index("crop") < theirs.index("keep"), "transformers escapes"
assert all(code in plain for code in (r"\u003c", r"\u0027", r"\u0026", r"\u00f6")), "Jinja does not escape"
assert plain.index("keep") < plain.index("crop"), "Jinja does not sort"
assert json.loads(plain.splitlines()[-1]) == json.loads(theirs.splitlines()[-1]) == tools, "they mean different tools"
EOF
