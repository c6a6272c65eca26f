"""A peer on a CPU: the decoder of a model in llama.cpp, which `xllamacpp` brings as a wheel.

A GGUF file of the architecture `olmoe` has the blocks of one plan, and the plan's top-k as the number of experts
used. The pictures' features have no way into its server, so that a prompt with a picture is given as words of its
own: further rows of the embedding. It runs in processes of its own, which are stopped while others are timed:
its threads may spin while they wait.

Started as a program it is such a process: it reads requests, and writes answers, as lines of JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from tempovlm.core.plan import Plan
    from tempovlm.model.vlm import Molmo

NAME, PACKAGE, PRECISIONS = "llama.cpp", "xllamacpp", ("f32", "f16")
PROMPT_TOKENS = 1024
"""Room for a prompt and its answer, and the tokens that are read at once."""

MOST_FILES = 4
"""Files that a process has open."""

_DEATH_SIGNAL = 1  # of prctl: the signal at the parent's end


def write_gguf(path: Path, model: Molmo, plan: Plan, precision: str, words: Tensor | None = None) -> None:
    """Write the plan's blocks of a decoder.

    Args:
        path: of the file.
        model: in float32 on a CPU.
        plan: its blocks are written; all have its top-k.
        precision: of the matrices, `f32` or `f16`.
        words: (N, D) further rows of the embedding, which the head never predicts in earnest: its rows are zeros.
    """
    import gguf
    import torch

    config, decoder = model.config, model.decoder
    (top_k,) = {step.top_k for step in plan.steps}
    extra = 0 if words is None else len(words)
    rows = config.embedding_size + extra
    writer = gguf.GGUFWriter(path, "olmoe")
    writer.add_name("pocket")
    writer.add_context_length(config.max_sequence_length)
    writer.add_embedding_length(config.width)
    writer.add_block_count(len(plan.steps))
    writer.add_feed_forward_length(config.expert_width)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(top_k)
    writer.add_vocab_size(rows)
    is_half = precision == "f16"
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if is_half else gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("llama")
    controls = ("<unk>", "<s>", "</s>")
    writer.add_token_list([controls[i] if i < len(controls) else f"\u2581t{i}" for i in range(rows)])
    writer.add_token_scores([0.0] * rows)
    kinds = (gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL)
    writer.add_token_types([kinds[i] if i < len(kinds) else gguf.TokenType.NORMAL for i in range(rows)])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    embedding, head = decoder.embedding[: config.embedding_size], decoder.head.weight
    if words is not None:
        embedding = torch.cat((embedding, words))
        head = torch.cat((head, head.new_zeros(extra, config.width)))
    tensors = {"token_embd": embedding, "output_norm": decoder.norm.weight, "output": head, **_blocks(model, plan)}
    for name, weight in tensors.items():
        array = weight.detach().float().contiguous().numpy()
        is_matrix = array.ndim > 1 and not name.endswith("ffn_gate_inp")
        writer.add_tensor(f"{name}.weight", array.astype("float16") if is_half and is_matrix else array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _blocks(model: Molmo, plan: Plan) -> dict[str, Tensor]:
    """Name of every weight of the plan's blocks → its values; queries and keys stay in their order."""
    found: dict[str, Tensor] = {}
    for i, (index, _) in enumerate(plan.steps):
        block: Any = model.decoder.blocks[index]
        attention, moe = block.attention, block.moe
        query, key, value = attention.qkv.weight.chunk(3)
        gate, up = moe.gate_up.chunk(2, dim=1)
        own = {
            "attn_norm": attention.norm.weight,
            "attn_q": query,
            "attn_k": key,
            "attn_v": value,
            "attn_q_norm": attention.q_norm.weight,
            "attn_k_norm": attention.k_norm.weight,
            "attn_output": attention.out.weight,
            "ffn_norm": moe.norm.weight,
            "ffn_gate_inp": moe.router.weight,
            "ffn_gate_exps": gate,
            "ffn_up_exps": up,
            "ffn_down_exps": moe.down,
        }
        found |= {f"blk.{i}.{name}": weight for name, weight in own.items()}
    return found


class Llama:
    """A process with a number of threads, which is stopped but while it works.

    Its threads are OpenMP's, whose wait policy alone says whether they spin: `poll` does nothing.
    """

    def __init__(self, threads: int, *, is_spinning: bool = False) -> None:
        policy = {"OMP_WAIT_POLICY": "ACTIVE" if is_spinning else "PASSIVE"}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=kept | policy,
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()  # it ends with this process from now on
        self._process.send_signal(signal.SIGSTOP)

    def ask(
        self, path: Path, tokens: Sequence[int], count: int, probs: int = 0, *, reuse: bool = False
    ) -> dict[str, Any]:
        """Read a prompt and make some tokens.

        Args:
            path: of the GGUF file.
            tokens: of the prompt.
            count: tokens to make.
            probs: the most probable tokens to return, of the first one; the rows of the file return all.
            reuse: keep what the prompt begins with, as far as the last one began so.

        Returns:
            `prompt_ms`, `token_ms` of each token after the first, and `log_probs` of the first one by token.

        Raises:
            RuntimeError: the process ended or could not answer.
        """
        request = {"path": str(path), "tokens": list(tokens), "count": count}
        request |= {"probs": probs, "reuse": reuse}
        with self.awake():
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        answer = json.loads(line or '{"fault": "the process ended"}')
        if "fault" in answer:
            raise RuntimeError(f"llama.cpp: {answer['fault']}")
        return answer

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Let the process run in the block."""
        self._process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def _open(path: str, threads: int) -> Any:
    """Load a file; if its name says f32, keys, values and attention are float32 too.

    Flash attention, the default, rounds them to float16 whatever the cache's type is.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = params.n_batch = params.n_ubatch = PROMPT_TOKENS
    params.n_parallel, params.n_gpu_layers = 1, 0
    if "f32" in Path(path).name:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    for one in (params.cpuparams, params.cpuparams_batch):
        one.n_threads, one.poll = threads, 0
    return xllamacpp.Server(params)


def _answered(server: Any, request: dict[str, Any]) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    asked = {
        "prompt": request["tokens"],
        "n_predict": request["count"],
        "n_probs": request["probs"],
        "temperature": 0.0,
        "ignore_eos": True,
        "cache_prompt": request["reuse"],
        "stream": True,
        "timings_per_token": True,
    }
    server.handle_completions(asked, lambda part: bool(parts.append(part)))
    faults = [part for part in parts if "timings" not in part]
    if faults or not parts:
        return {"fault": str(faults)[:300]}
    made_ms = {part["timings"]["predicted_n"]: part["timings"]["predicted_ms"] for part in parts}
    log_probs = (parts[0]["choices"][0]["logprobs"] or {"content": [{"top_logprobs": []}]})["content"][0]
    return {
        "prompt_ms": parts[-1]["timings"]["prompt_ms"],
        "token_ms": [made_ms[n] - made_ms[n - 1] for n in sorted(made_ms) if n - 1 in made_ms],
        "log_probs": {one["id"]: one["logprob"] for one in log_probs["top_logprobs"]},
    }


def log_softmax(log_probs: dict[str, float], size: int) -> list[float]:
    """Return the logarithms of the shares of the first `size` tokens among themselves."""
    values = [log_probs[str(token)] for token in range(size)]
    total = math.log(sum(map(math.exp, values)))
    return [value - total for value in values]


def main() -> None:
    """Answer requests until there are none; the last files stay open."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the library's own lines
    if sys.platform == "linux":  # a stopped process would stay for ever
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
    print("ready", file=answers, flush=True)
    servers: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if request["path"] not in servers:
            for path in list(servers)[: 1 - MOST_FILES]:
                del servers[path]
            servers[request["path"]] = _open(request["path"], int(sys.argv[1]))
        answers.write(json.dumps(_answered(servers[request["path"]], request)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
