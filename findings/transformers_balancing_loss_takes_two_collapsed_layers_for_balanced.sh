#!/usr/bin/env bash
# Two layers of which each uses only half of its experts have the least balancing loss, if the halves differ.
#
# Versions: transformers 5.24.0, torch 2.13.0 (CPU).
# Behaviour: the auxiliary loss of Mixtral, OLMoE and Qwen3-MoE joins the tokens of all layers before it counts them, so
#   that expert 0 of one layer and expert 0 of another are one expert. What one layer never uses, another makes up for.
#   The formula in the Switch Transformer's paper (arXiv 2101.03961, equation 4) is for one layer.
# Output: 8 experts, 2 for each token; balanced layers 2.0; both layers on experts 0 to 3: 4.0; one on 0 to 3, the
#   other on 4 to 7: 2.0; either of these alone 4.0; eight layers, each on two experts of its own: 2.0, one alone 8.0.
# Wrong guess: a loss at its least value means that the experts of every layer share the work. Half of the experts, and
#   of the memory, may be idle, and expert parallelism has a device that waits in each layer.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$dir/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$dir/venv/bin/python" - <<'EOF'
import torch
from transformers.models.mixtral import modeling_mixtral
from transformers.models.olmoe import modeling_olmoe
from transformers.models.qwen3_moe import modeling_qwen3_moe

EXPERTS, CHOSEN, TOKENS = 8, 2, 4000
torch.manual_seed(0)


def layer(*used):
    """Router logits, one row a token, of a layer that uses some experts only, those equally often."""
    logits = torch.full((TOKENS, EXPERTS), -30.0)
    logits[:, used] = torch.randn(TOKENS, len(used))
    return logits


half, rest = layer(0, 1, 2, 3), layer(4, 5, 6, 7)
pairs = [layer(first, (first + 1) % EXPERTS) for first in range(EXPERTS)]
MODELS = {
    "balanced": [layer(*range(EXPERTS)) for _ in range(2)],
    "both on one half": [half, layer(0, 1, 2, 3)],
    "one half each": [half, rest],
    "the first half alone": [half],
    "the other alone": [rest],
    "eight layers on two each": pairs,
    "one of these alone": pairs[:1],
}
for module in (modeling_mixtral, modeling_olmoe, modeling_qwen3_moe):
    losses = {
        name: module.load_balancing_loss_func(tuple(layers), EXPERTS, CHOSEN).item() for name, layers in MODELS.items()
    }
    print(module.__name__.split(".")[-1], ", ".join(f"{name} {loss:.2f}" for name, loss in losses.items()))
    for name in ("balanced", "one half each", "eight layers on two each"):
        assert abs(losses[name] - CHOSEN) < 0.05, f"{name}: a loss that is not the least"
    for name in ("both on one half", "the first half alone", "the other alone"):
        assert abs(losses[name] - 2 * CHOSEN) < 0.1, f"{name}: idle experts do not double the loss"
    assert abs(losses["one of these alone"] - 4 * CHOSEN) < 0.2, "two of eight experts do not cost four times as much"
EOF
