#!/usr/bin/env bash
# loss_type="dr_grpo" alone is half of Dr. GRPO in trl: advantages are still divided by the group's spread.
#
# Versions: trl 1.16.0, transformers 5.24.0, torch 2.13.0 (CPU).
# Behaviour: the loss type changes only how tokens are summed. The paper's other half, no division by the standard
#   deviation (arXiv 2503.20783), has a flag of its own whose default is "group": scale_rewards="none".
# Output: with rewards 10 apart the largest advantage is 1.16 for grpo and for dr_grpo, and 15 with scale_rewards="none".
# Wrong guess: naming the method turns the method on.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$dir/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 trl==1.16.0
cd "$dir"
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - <<'EOF'
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

words = ["<pad>", "<bos>", "<eos>", "[UNK]", *(f"w{index}" for index in range(28))]
plain = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
plain.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=plain, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="[UNK]"
)
shape = LlamaConfig(
    vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
    max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)


def reward(completions, **_):
    """Rewards 0, 10, 20, 30: a mean of 15 and a standard deviation of 12.9."""
    return [10.0 * index for index in range(len(completions))]


def advantages(**flags):
    """The advantages that the first step's loss is given."""
    seen = []

    class Watched(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            seen.append(inputs["advantages"].abs().max().item())
            return super()._compute_loss(model, inputs)

    args = GRPOConfig(
        output_dir="out", per_device_train_batch_size=4, num_generations=4, max_completion_length=4, max_steps=1,
        report_to=[], use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, **flags,
    )
    data = Dataset.from_dict({"prompt": ["w1 w2 w3"] * 8})
    torch.manual_seed(0)
    Watched(LlamaForCausalLM(shape), reward, args=args, train_dataset=data, processing_class=tokenizer).train()
    return seen[0]


grpo = advantages(loss_type="grpo")
dr_grpo = advantages(loss_type="dr_grpo")
unscaled = advantages(loss_type="dr_grpo", scale_rewards="none")
print(f"largest advantage: grpo {grpo:.3f}, dr_grpo {dr_grpo:.3f}, dr_grpo with scale_rewards none {unscaled:.3f}")
assert abs(grpo - 1.162) < 0.01 and abs(dr_grpo - grpo) < 1e-4, "dr_grpo scales otherwise"
assert abs(unscaled - 15) < 0.01, "scale_rewards='none' scales"
EOF
