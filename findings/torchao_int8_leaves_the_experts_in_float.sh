#!/usr/bin/env bash
# OLMoE "quantised to int8" by torchao is nearly as large as before: its attention is int8, its experts are not.
#
# Versions: torchao 0.18.0, transformers 5.24.0, accelerate 1.15.0, torch 2.13.0 (CPU).
# Behaviour: quantize_ changes modules that are nn.Linear. Since version 5 transformers keeps all experts of a block in
#   two parameters of three dimensions, which belong to no nn.Linear; they stay as they are, without a warning, also
#   where from_pretrained is given a TorchAoConfig.
# Output: share of the parameters that is int8, with 64 experts and widths in OLMoE's ratio: quantize_ 0.05,
#   from_pretrained 0.04 (the head stays too); parameters of experts among them: 0 and 0.
# Wrong guess: int8 weights are a quarter of float32 ones, as they were when every expert was three nn.Linear; and
#   answers as good as before show that the experts bear int8.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$dir/venv/bin/pip" install -q --disable-pip-version-check torchao==0.18.0 transformers==5.24.0 accelerate==1.15.0
cat > "$dir/quantise.py" <<'EOF'
import sys

import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import OlmoeConfig, OlmoeForCausalLM, TorchAoConfig

shape = OlmoeConfig(
    vocab_size=800, hidden_size=128, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=4, num_experts=64, num_experts_per_tok=8, pad_token_id=0, eos_token_id=1,
)
model = OlmoeForCausalLM(shape).eval()
count = model.num_parameters()
model.save_pretrained(sys.argv[1])


def in_int8(quantised):
    """The share of all parameters, and the number of the experts', that torchao holds as int8."""
    held = {name: p.numel() for name, p in quantised.named_parameters() if "Int8" in type(p).__name__}
    return sum(held.values()) / count, sum(".experts." in name for name in held)


quantize_(model, Int8WeightOnlyConfig())
here = in_int8(model)
loaded = OlmoeForCausalLM.from_pretrained(
    sys.argv[1], quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32, device_map="cpu"
)
there = in_int8(loaded)
print(f"int8: quantize_ {here[0]:.2f}, from_pretrained {there[0]:.2f}, experts {here[1]} {there[1]}")
assert here[0] > 0.02 and there[0] > 0.02, "not even the attention is quantised"
assert here[1] == there[1] == 0, "the experts are quantised"
EOF
"$dir/venv/bin/python" "$dir/quantise.py" "$dir/model" 2> "$dir/log" || { tail -n 5 "$dir/log" >&2; exit 1; }
