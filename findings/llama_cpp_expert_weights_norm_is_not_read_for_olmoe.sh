#!/usr/bin/env bash
# llama.cpp reads the key that says whether the weights of chosen experts sum to 1 for some architectures, but not for
# OLMoE or Qwen3 MoE.
#
# Versions: xllamacpp 2026.10.11549 (a llama.cpp of October 2026), gguf 0.19.0.
# Behaviour: ARCH.expert_weights_norm, GGUF's place for norm_topk_prob, is loaded without a word and then ignored where
#   the graph of the architecture has the answer written into it: olmoe never divides, qwen3moe always does. bailingmoe
#   obeys. Both published models fit; one trained the other way is another model there, at every number of experts.
# Output: with one expert for each token, whether twice the router's weights give another answer (they do unless the one
#   weight is divided by itself); key false and true: olmoe True True, qwen3moe False False, bailingmoe True False.
# Wrong guess: what the file's metadata says about the router is what runs, or the file is refused.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check numpy==2.4.6 gguf==0.19.0 xllamacpp==2026.10.11549
cat > "$dir/route.py" <<'EOF'
import sys

import gguf
import numpy as np
import xllamacpp

PATH, D, V, BLOCKS, EXPERTS, HEADS = sys.argv[1], 64, 100, 2, 8, 4
SHARED = "bailingmoe"  # the only one of the three that wants a shared expert, which is zero here
QK_NORM = {"olmoe": D, "qwen3moe": D // HEADS}


def write(arch, divided, scale):
    rng = np.random.default_rng(0)

    def weight(*shape):
        return (rng.standard_normal(shape) * 1.5 * shape[-1] ** -0.5).astype(np.float32)

    writer = gguf.GGUFWriter(PATH, arch)
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(D)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_key_length(D // HEADS)
    writer.add_value_length(D // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(V)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(1)
    writer.add_expert_feed_forward_length(D)
    writer.add_expert_weights_norm(divided)
    if arch == SHARED:
        writer.add_leading_dense_block_count(0)
        writer.add_expert_shared_count(1)
        writer.add_expert_weights_scale(1.0)
        writer.add_rope_dimension_count(D // HEADS)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(V)])
    writer.add_token_scores([0.0] * V)
    writer.add_token_types([2, 3, 3] + [1] * (V - 3))
    for name in ("token_embd", "output"):
        writer.add_tensor(f"{name}.weight", weight(V, D) * 3)
    writer.add_tensor("output_norm.weight", np.ones(D, np.float32))
    for i in range(BLOCKS):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(D, np.float32))
        for name in ("attn_q_norm", "attn_k_norm") if arch in QK_NORM else ():
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(QK_NORM[arch], np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            writer.add_tensor(f"blk.{i}.{name}.weight", weight(D, D))
        writer.add_tensor(f"blk.{i}.ffn_gate_inp.weight", weight(EXPERTS, D) * np.float32(scale))
        for name in ("ffn_gate", "ffn_up", "ffn_down"):
            writer.add_tensor(f"blk.{i}.{name}_exps.weight", weight(EXPERTS, D, D))
            if arch == SHARED:
                writer.add_tensor(f"blk.{i}.{name}_shexp.weight", np.zeros((D, D), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def log_probs(arch, divided, scale):
    write(arch, divided, scale)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = PATH, 64, 1
    server = xllamacpp.Server(params)
    asked = {"prompt": [3 + i * 7 % 90 for i in range(20)], "n_predict": 1, "n_probs": V, "temperature": 0.0}
    top = server.handle_completions(asked)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return np.array([p for _, p in sorted((one["id"], one["logprob"]) for one in top)])


expected = {"olmoe": [True, True], "qwen3moe": [False, False], SHARED: [True, False]}
for arch, right in expected.items():
    seen = [
        bool(np.abs(log_probs(arch, divided, 1) - log_probs(arch, divided, 2)).max() > 1e-3)
        for divided in (False, True)
    ]
    print(arch, *seen)
    assert seen == right, f"{arch} takes expert_weights_norm otherwise"
EOF
"$dir/venv/bin/python" "$dir/route.py" "$dir/tiny.gguf" 2> "$dir/log" || { tail -n 5 "$dir/log" >&2; exit 1; }
