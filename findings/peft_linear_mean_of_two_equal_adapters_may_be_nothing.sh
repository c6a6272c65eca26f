#!/usr/bin/env bash
# The "linear" mean of two LoRA adapters is not the mean of what they do: of two that do the same it may be nothing.
#
# Versions: peft 0.21.2, torch 2.13.0 (CPU).
# Behaviour: add_weighted_adapter(combination_type="linear") adds the factors, not their products: (B1 + B2)(A1 + A2)
#   has B1 A2 and B2 A1 as well. Factors have no sign of their own: (-B)(-A) is BA, but B - B is 0. "cat" stacks the
#   factors, and "svd" with svd_rank of the sum of ranks splits the sum anew: both are the mean.
# Output: error of the mean of two adapters, relative to it: linear about 1, cat 0, svd 0; of an adapter and the same
#   with both factors negated: linear 1 (the mean is 0), cat 0, svd 0.
# Wrong guess: adapters are changes of weights, so their linear combination is that of the changes. Merged skills
#   disappear or something else comes in, while either adapter alone works.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$dir/venv/bin/pip" install -q --disable-pip-version-check peft==0.21.2 transformers==5.24.0
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$dir/venv/bin/python" - <<'EOF'
import torch
from peft import LoraConfig, get_peft_model

RANK, NAMES = 4, ("charts", "photos", "negated")
torch.manual_seed(0)
config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"], init_lora_weights=False)
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False)), config, adapter_name=NAMES[0])
for name in NAMES[1:]:
    model.add_adapter(name, config)
layer = model.base_model.model[0]
with torch.no_grad():
    for factors in (layer.lora_A, layer.lora_B):
        factors["negated"].weight.copy_(-factors["charts"].weight)


def change(name):
    """What an adapter adds to the layer's weights."""
    return layer.get_delta_weight(name).detach()


def error_of_mean(first, second, kind):
    """How far the mean of two adapters, combined as `kind`, is from the mean of their changes, relative to it."""
    name = f"{kind}_{first}_{second}"
    more = {"svd_rank": 2 * RANK} if kind == "svd" else {}
    model.add_weighted_adapter([first, second], [0.5, 0.5], name, combination_type=kind, **more)
    wanted = (change(first) + change(second)) / 2
    return ((change(name) - wanted).norm() / wanted.norm()).item()


same = (change("charts") - change("negated")).norm().item()
print(f"difference of charts and negated: {same:g}")
assert same < 1e-6, "the negated factors do something else"
for other in ("photos", "negated"):
    errors = {kind: error_of_mean("charts", other, kind) for kind in ("linear", "cat", "svd")}
    print(f"charts and {other}:", ", ".join(f"{kind} {error:.2f}" for kind, error in errors.items()))
    assert errors["linear"] > 0.5, "linear is the mean of the changes"
    assert max(errors["cat"], errors["svd"]) < 1e-4, "cat or svd is not the mean of the changes"
lost = change("linear_charts_negated").norm().item()
assert lost < 1e-6, "something is left of the mean of two equal adapters"
EOF
