#!/usr/bin/env bash
# A causal model whose logits are all NaN "answers" without a word under greedy search; only sampling raises.
#
# Versions: transformers 5.24.0, torch 2.13.0 (CPU).
# Behaviour: argmax of a row of NaN is index 0, so greedy search writes token 0 to the cap (here the padding token: the
#   decoded answer is empty). Beam search ends at once. No warning in either. Sampling raises a RuntimeError.
# Output: greedy [1, 5, 6, 0, 0, 0, 0], beams end without a word, sampling: RuntimeError.
# Wrong guess: a model that overflowed (float16 weights are the usual cause) fails loudly in every mode, or at least warns.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$dir/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0
"$dir/venv/bin/python" - <<'EOF'
import warnings

import torch
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
model = LlamaForCausalLM(config).eval()
with torch.no_grad():
    model.model.norm.weight[3] = float("nan")
prompt = torch.tensor([[1, 5, 6]])
assert model(prompt).logits.isnan().all()
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    greedy = model.generate(prompt, max_new_tokens=4, do_sample=False)[0].tolist()
    beams = model.generate(prompt, max_new_tokens=4, do_sample=False, num_beams=3)[0].tolist()
said = [str(warning.message) for warning in seen if "nan" in str(warning.message).lower()]
try:
    model.generate(prompt, max_new_tokens=4, do_sample=True)
    sampled = "no error"
except RuntimeError as error:
    sampled = f"RuntimeError: {error}"
print("greedy", greedy, "| beams", beams, "| sampled", sampled)
assert greedy == [1, 5, 6, 0, 0, 0, 0], "greedy search does something else"
assert beams[:3] == [1, 5, 6] and not said, "NaN is spoken of"
assert sampled.startswith("RuntimeError"), "sampling does not raise"
EOF
