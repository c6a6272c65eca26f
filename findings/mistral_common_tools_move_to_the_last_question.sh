#!/usr/bin/env bash
# Mistral's prompt of a second question shares 1 token with that of the first: tools and system prompt have moved on.
#
# Versions: mistral-common 1.13.1, sentencepiece 0.2.3. The tokenizers lie in the package.
# Behaviour: versions 2 to 11 of the format write the tools before the last question, and versions 2 and 3 the system
#   prompt within it. With each question they leave the place where they stood, and all that follows that place is
#   another prompt. Version 7 has the system prompt in front, version 13 the tools too.
# Output: tokens of the first prompt, and how many of them the second one begins with, with neither, with a system
#   prompt, with a tool. Version 3: 7 and 7, 16 and 2, 43 and 1; version 7: 7 and 7, 18 and 18, 46 and 1.
# Wrong guess: what is said before a conversation stands before it, so that every prompt begins with the one before it.
#   A server's prefix cache finds one token, and computes the first question's picture once more; and the model sees
#   its earlier answers as if it had had no tools.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check mistral-common==1.13.1 sentencepiece==0.2.3
"$dir/venv/bin/python" - <<'EOF'
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Function, Tool
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

SYSTEM = SystemMessage(content="Be brief and say only what you see.")
CROP = Tool(function=Function(name="crop", description="crop a picture", parameters={"type": "object"}))
ONE = [UserMessage(content="What is shown?")]
TWO = [*ONE, AssistantMessage(content="A bus."), UserMessage(content="Which colour?")]
WITH = {"neither": ([], None), "a system prompt": ([SYSTEM], None), "a tool": ([], [CROP])}


def shared(tokenizer, before, tools):
    """The tokens of the first prompt, and how many of them the second one begins with."""
    requests = (ChatCompletionRequest(messages=before + messages, tools=tools) for messages in (ONE, TWO))
    first, second = (tokenizer.encode_chat_completion(request).tokens for request in requests)
    differ = (i for i, pair in enumerate(zip(first, second)) if pair[0] != pair[1])
    return len(first), next(differ, len(first))


versions = {"version 3": MistralTokenizer.v3(is_tekken=True), "version 7": MistralTokenizer.v7()}
for name, tokenizer in versions.items():
    found = {what: shared(tokenizer, *added) for what, added in WITH.items()}
    print(name, *(f"{what}: {tokens} tokens, shared {kept};" for what, (tokens, kept) in found.items()))
    kept = {what: kept / tokens for what, (tokens, kept) in found.items()}
    assert kept["neither"] == 1, f"{name}: not even the question is shared"
    assert found["a tool"][1] == 1, f"{name}: the tool stays in its place"
    assert (kept["a system prompt"] == 1) == (name == "version 7"), f"{name}: the system prompt is elsewhere"
EOF
