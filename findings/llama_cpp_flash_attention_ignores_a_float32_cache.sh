#!/usr/bin/env bash
# llama.cpp with float32 weights and a float32 cache still attends in float16 on a CPU, unless flash attention is off.
#
# Versions: xllamacpp 2026.10.11549 (a llama.cpp of October 2026), gguf 0.19.0.
# Behaviour: flash attention is on by default ("auto"); for a prompt of many tokens it rounds keys and values to float16,
#   so that cache_type_k and cache_type_v of F32 give the very numbers of F16. With flash attention off the two differ,
#   and F32 agrees with a float32 reference.
# Output: largest difference of log-probabilities of the next token after 200 tokens, caches of F32 against F16: flash
#   attention on 0.0, off 2.0e-02; on against off, both F32: 1.3e-02.
# Wrong guess: a file of F32 with a cache of F32 is computed in float32.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check numpy==2.4.6 gguf==0.19.0 xllamacpp==2026.10.11549
cat > "$dir/attend.py" <<'EOF'
import sys

import gguf
import numpy as np
import xllamacpp

PATH, D, V, BLOCKS = sys.argv[1], 128, 300, 4
rng = np.random.default_rng(0)


def weight(*shape):
    return (rng.standard_normal(shape) * 1.5 * shape[-1] ** -0.5).astype(np.float32)


def write():
    writer = gguf.GGUFWriter(PATH, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(D)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(D)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(V)
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
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            writer.add_tensor(f"blk.{i}.{name}.weight", weight(D, D))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def log_probs(flash, kind):
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = PATH, 512, 1
    params.cache_type_k = params.cache_type_v = kind
    params.flash_attn_type = flash
    server = xllamacpp.Server(params)
    asked = {"prompt": [3 + i * 7 % 290 for i in range(200)], "n_predict": 1, "n_probs": V, "temperature": 0.0}
    answer = server.handle_completions(asked)
    top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return np.array([p for _, p in sorted((one["id"], one["logprob"]) for one in top)])


write()
kinds, attention = xllamacpp.ggml_type, xllamacpp.llama_flash_attn_type
found = {
    (flash, kind): log_probs(
        getattr(attention, f"LLAMA_FLASH_ATTN_TYPE_{flash}"), getattr(kinds, f"GGML_TYPE_{kind}")
    )
    for flash in ("AUTO", "DISABLED")
    for kind in ("F32", "F16")
}


def apart(one, other):
    return float(np.abs(found[one] - found[other]).max())


on, off = (apart((flash, "F32"), (flash, "F16")) for flash in ("AUTO", "DISABLED"))
across = apart(("AUTO", "F32"), ("DISABLED", "F32"))
print(f"F32 against F16 cache: flash attention on {on:.1e}, off {off:.1e}; on against off, F32: {across:.1e}")
assert off > 1e-3, "the type of the cache does not matter without flash attention either"
assert on < off / 100 and across > 1e-3, "flash attention keeps a float32 cache in float32"
EOF
"$dir/venv/bin/python" "$dir/attend.py" "$dir/tiny.gguf" 2> "$dir/log" || { tail -n 5 "$dir/log" >&2; exit 1; }
