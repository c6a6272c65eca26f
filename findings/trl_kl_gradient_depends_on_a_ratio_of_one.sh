#!/usr/bin/env bash
# trl multiplies the KL estimate of GRPO by the importance ratio, which is 1 on fresh samples: the loss stays, its
# gradient does not.
#
# Versions: trl 1.16.0, transformers 5.24.0, torch 2.13.0 (CPU).
# Behaviour: use_bias_correction_kl is on by default. The ratio's value is 1 in the first iteration but it has a
#   gradient, so that the term's gradient is that of KL(policy || reference). Without it, which is the formula as the
#   GRPO paper prints it (arXiv 2402.03300, equation 4), the gradient is on average that of KL(reference || policy).
# Output: equal losses, gradients that differ by more than a tenth of their size.
# Wrong guess: a factor of 1 may be left out when the formula is written anew, and --beta means the same in both.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$dir/venv/bin/pip" install -q --disable-pip-version-check transformers==5.24.0 trl==1.16.0
cd "$dir"
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - <<'EOF' 2>errors || { tail -5 errors >&2; exit 1; }
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
    max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0, dtype="float32",
)
torch.manual_seed(0)
LlamaForCausalLM(shape).save_pretrained("model")
tokenizer.save_pretrained("model")


def kl_term(corrected):
    """Loss and gradient of the head where all rewards are 0, so that the KL term is all there is."""
    seen = []

    class Watched(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            (grad,) = torch.autograd.grad(loss, model.lm_head.weight, retain_graph=True)
            seen.append((loss.item(), grad.clone()))
            return loss

    args = GRPOConfig(
        output_dir="out", per_device_train_batch_size=4, num_generations=4, max_completion_length=4, max_steps=1,
        report_to=[], use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, beta=1.0, seed=1,
        use_bias_correction_kl=corrected,
    )
    data = Dataset.from_dict({"prompt": ["w1 w2 w3"] * 8})
    trainer = Watched(
        "model", lambda completions, **_: [0.0] * len(completions), args=args, train_dataset=data,
        processing_class=tokenizer,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        head = trainer.model.lm_head.weight
        head += 0.3 * torch.randn(head.shape, generator=generator)
    torch.manual_seed(1)
    trainer.train()
    return seen[0]


with_ratio, without = kl_term(True), kl_term(False)
apart = ((with_ratio[1] - without[1]).norm() / without[1].norm()).item()
print(f"losses {with_ratio[0]:.4f} and {without[0]:.4f}, gradients {apart:.0%} apart")
assert with_ratio[0] > 0 and abs(with_ratio[0] - without[0]) < 1e-5, "the losses differ"
assert apart > 0.1, "the gradients agree"
EOF
