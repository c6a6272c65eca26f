#!/usr/bin/env bash
# llama.cpp's poll level, "0 to wait asleep", does nothing in a build with OpenMP, as the wheels of xllamacpp are.
#
# Versions: xllamacpp 2026.10.11549, gguf 0.19.0, Linux x86_64.
# Behaviour: cpuparams.poll (`--poll` of the programs) is read by llama.cpp's own threads only. With OpenMP the threads
#   wait as OMP_WAIT_POLICY says, which is read when the library is loaded: ACTIVE with poll=0 burns a core after an
#   answer, PASSIVE with poll=100 burns none.
# Output: processor time in the second after an answer, two threads: ACTIVE, poll=0 0.43 s (all that the
#   neighbours left of the core); PASSIVE, poll=100 0.00 s.
# Wrong guess: poll=0 makes llama.cpp a quiet neighbour, and poll=100 a loud one, whatever the environment says.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check numpy==2.4.6 gguf==0.19.0 xllamacpp==2026.10.11549
cat > "$dir/wait.py" <<'EOF'
import os
import sys
import time

import gguf
import numpy as np
import xllamacpp

PATH, POLL, D, V, BLOCKS = sys.argv[1], int(sys.argv[2]), 64, 40, 2


def write():
    writer = gguf.GGUFWriter(PATH, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(D)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(V)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{i}" for i in range(V)])
    writer.add_token_scores([0.0] * V)
    writer.add_token_types([2, 3, 3] + [1] * (V - 3))
    for name in ("token_embd", "output"):
        writer.add_tensor(f"{name}.weight", np.ones((V, D), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(D, np.float32))
    for i in range(BLOCKS):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(D, np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones((D, D), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


write()
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = PATH, 64, 1
for one in (params.cpuparams, params.cpuparams_batch):
    one.n_threads, one.poll = 2, POLL
server = xllamacpp.Server(params)
server.handle_completions({"prompt": list(range(3, 30)), "n_predict": 2})
before = time.process_time()
time.sleep(1)
burnt = time.process_time() - before
print(f"OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}, poll={POLL}: {burnt:.2f} s", flush=True)
is_loud = os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
os._exit(0 if (burnt > 0.1) == is_loud else 1)
EOF
for pair in "ACTIVE 0" "PASSIVE 100"; do
    read -r policy poll <<< "$pair"
    OMP_WAIT_POLICY=$policy "$dir/venv/bin/python" "$dir/wait.py" "$dir/tiny.gguf" "$poll" 2> "$dir/log" || {
        tail -n 5 "$dir/log" >&2
        echo "the environment does not say how the threads wait, or poll does" >&2
        exit 1
    }
done
