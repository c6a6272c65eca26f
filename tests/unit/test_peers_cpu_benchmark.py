"""The benchmark of a CPU's peers: whose turn it is, which variants count, and that peers compute the same."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_model
from preloaded import Preloaded
from tempovlm.api import model_folder
from tempovlm.core.errors import UserError
from tempovlm.core.plan import Plan, Ranking
from tempovlm.model.cache import KVCache
from tempovlm.model.vlm import Molmo


@pytest.fixture
def benchmark(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(repo_root / "benchmarks"))
    return importlib.import_module


def plan_of(num_blocks: int) -> Plan:
    shape = tiny_model.CONFIG.shape
    knobs = next(k for k in tiny_model.SPACE if k.num_blocks == num_blocks)
    return Plan.build(knobs, Ranking.evenly_spaced(shape.num_blocks), shape)


def test_everyone_has_two_turns_and_no_more_than_asked(benchmark: Any) -> None:
    stages = benchmark("peers_cpu_stages")
    calls = [0, 0, 0]

    def job(number: int) -> Any:
        def turn() -> list[float]:
            calls[number] += 1
            return [float(number), float(number)]

        return turn

    jobs = [job(i) for i in range(3)]
    assert [len(times) for times in stages.take_turns(jobs, 0.0, 9)] == [4, 4, 4]
    assert calls == [3, 3, 3]
    assert [len(times) for times in stages.take_turns(jobs, math.inf, 5)] == [10, 10, 10]


def row(who: str, threads: int, company: int, p50: float, p99: float) -> dict[str, Any]:
    known = {"name": "answer", "company": company, "who": who, "threads": threads, "times": 9}
    return known | {"p50": p50, "p95": p99, "p99": p99}


def test_table_has_the_best_that_counts(benchmark: Any) -> None:
    record = {
        "rows": [
            row("ours_torch_f32", 2, 0, 60.0, 70.0),
            row("openvino_f32", 2, 0, 30.0, 31.0),
            row("openvino_bf16", 2, 0, 20.0, 21.0),
            row("openvino_f32", 2, 1, 40.0, 90.0),
            row("openvino_f32", 1, 1, 50.0, 55.0),
            row("llama.cpp_f16_spinning", 2, 0, 9.0, 12.0),
            row("llama.cpp_f16", 1, 0, 10.0, 11.0),
        ],
        "accuracy": [{"who": "openvino_bf16", "counts": False}, {"who": "llama.cpp_f16", "counts": True}],
    }
    lines = benchmark("peers_cpu").table(record).splitlines()
    assert [part.strip() for part in lines[0].split("|")[3:-1]] == ["TempoVLM, torch", "OpenVINO", "llama.cpp"]
    assert lines[2].split("|")[3:-1] == [" 60 / 70 (2, f32) ", " 30 / 31 (2, f32) ", " 9 / 12 (2, f16, spinning) "]
    assert lines[3].split("|")[3:-1] == [" – ", " 50 / 55 (1, f32) ", " – "]


def test_in_company_one_type_is_left_for_each_number_of_threads(benchmark: Any) -> None:
    contender, main = benchmark("peers_cpu_stages").Contender, benchmark("peers_cpu")
    ours = contender("ours_torch", "tempovlm", "f32", 2, lambda _: None)
    exact, fast = (contender("openvino", "openvino", kind, 2, lambda _: None) for kind in ("f32", "bf16"))
    single = contender("openvino", "openvino", "f32", 1, lambda _: None)
    rows = [
        row(one.label, one.threads, 0, p50, p50)
        for one, p50 in ((ours, 9.0), (exact, 3.0), (fast, 2.0), (single, 4.0))
    ]
    every, exact_only = {"openvino_f32", "openvino_bf16"}, {"openvino_f32"}
    assert main.fastest_types([ours, exact, fast, single], rows, "answer", every) == [ours, fast, single]
    assert main.fastest_types([ours, exact, fast, single], rows, "answer", exact_only) == [ours, exact, single]


def test_shares_of_our_tokens_sum_to_one(benchmark: Any) -> None:
    found = benchmark("peers_cpu_llama").log_softmax({"0": -1.0, "1": -2.0, "2": -0.1}, 2)
    assert sum(map(math.exp, found)) == pytest.approx(1.0)
    assert found[0] - found[1] == pytest.approx(1.0)


def kept_question(picture: int, texts: dict[str, str], right: str = "red") -> dict[str, Any]:
    errors = {who: [0.5 * (picture + 1), 0.1, True] for who in texts if not who.startswith("ours")}
    texts = {"ours_torch_f32": "red"} | texts
    return {"key": [picture, 0], "dataset": "okvqa", "right": right, "texts": {"all": texts}, "errors": errors}


def test_runs_share_the_answers_that_they_keep(benchmark: Any, tmp_path: Path) -> None:
    kept = benchmark("peers_cpu_accuracy").Kept
    versions = {"ours_torch_f32": "2.13", "openvino_f32": "1", "openvino_bf16": "1"}
    about = {"weights": "aaaaaaaaaaaa"}
    first, second = kept(tmp_path, about, versions), kept(tmp_path, about, versions)
    first.add([kept_question(0, {"openvino_f32": "red", "openvino_bf16": "red"})])
    second.add([kept_question(1, {"openvino_f32": "red"}), kept_question(2, {"openvino_f32": "blue"}, "blue")])
    third = kept(tmp_path, about, versions)
    third.add([kept_question(1, {"openvino_bf16": "blue"})])
    every = kept(tmp_path, about, versions)
    assert [every.lacks(picture, "openvino_bf16") for picture in range(4)] == [False, False, True, True]
    row = every.row("openvino_f32", {0, 1, 2})
    assert (row["num_samples"], row["answers_that_differ"], row["counts"]) == (3, 1, False)
    assert (row["accuracy_points"], row["logit_error_max"]) == pytest.approx((100 / 3, 1.5))
    assert every.row("openvino_f32", {0, 1})["counts"]
    assert every.row("openvino_bf16", {0, 1, 2})["right_to_wrong"] == 1
    newer = kept(tmp_path, about, versions | {"openvino_bf16": "2"})
    assert newer.lacks(0, "openvino_bf16")
    assert not newer.lacks(0, "openvino_f32")
    assert kept(tmp_path, {"weights": "0123456789ab"}, versions).lacks(0, "openvino_f32")


def test_a_line_that_was_cut_is_answered_again(benchmark: Any, tmp_path: Path) -> None:
    kept = benchmark("peers_cpu_accuracy").Kept
    versions = {"ours_torch_f32": "2.13", "openvino_f32": "1"}
    kept(tmp_path, {}, versions).add([kept_question(n, {"openvino_f32": "red"}) for n in range(2)])
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text()[:-9])
    again = kept(tmp_path, {}, versions)
    assert [again.lacks(picture, "openvino_f32") for picture in range(2)] == [True, False]


def test_fewer_questions_are_spread_over_all_pictures(benchmark: Any) -> None:
    pictures_of = benchmark("peers_cpu_accuracy").pictures_of
    folder = model_folder("pocket")
    card = json.loads((folder / "accuracy.json").read_text())
    pictures = card["recipe"]["batch"] * card["recipe"]["validation_batches"]
    asked = card["settings"][0]["num_samples"]
    some, more, every = (pictures_of(folder, count) for count in (asked // 24, asked // 7, 10**6))
    assert more[: len(some)] == some
    assert sorted(every) == list(range(pictures))
    assert every[: len(more)] == more
    eighths = [sum(8 * number // pictures == part for number in some) for part in range(8)]
    assert max(eighths) - min(eighths) <= 2
    assert len(some) == pytest.approx(pictures / 24, abs=1)


def test_accuracies_replace_those_of_a_result(benchmark: Any, tmp_path: Path) -> None:
    main, path = benchmark("peers_cpu"), tmp_path / "result.json"
    old = [{"who": "openvino_f32", "counts": False}, {"who": "llama.cpp_f16", "counts": True}]
    rows = [row("openvino_f32", 2, 0, 30.0, 31.0)]
    path.write_text(json.dumps({"stamp": {"weights": "a"}, "peers": {}, "rows": rows, "accuracy": old}))
    new = [{"who": "openvino_f32", "counts": True}]
    found = main.with_accuracy(path, {"weights": "a"}, new)
    assert found["rows"] == rows
    assert found["accuracy"] == [old[1], *new]
    with pytest.raises(UserError, match="of other weights"):
        main.with_accuracy(path, {"weights": "b"}, new)
    assert main.with_accuracy(tmp_path / "none.json", {"weights": "a"}, new)["accuracy"] == new


def test_wrong_input_is_told_in_a_line(
    repo_root: Path, benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, preloaded: Preloaded
) -> None:
    main, other = benchmark("peers_cpu"), tmp_path / "other.json"
    other.write_text('{"rows": [{"name": "low"}]}')
    monkeypatch.setattr(main, "find_spec", lambda name: None if name == "gguf" else name)
    assert main.missing(["openvino", "onnxruntime"]) is None
    assert main.missing(["llama.cpp"]).startswith("--peers llama.cpp: gguf is not installed; pip install")
    for words, named in (
        (("--accuracy", "-1"), "--accuracy -1"),
        (("--peers", "--backends", "torch:half8"), "--backends torch:half8"),
        (("--table", "nowhere.json"), "nowhere.json"),
        (("--table", str(other)), f"{other}: no result of peers_cpu.py"),
        (("--only_accuracy",), "--only_accuracy: needs --json"),
        (("--shard", "0/2"), "--shard: only with --only_accuracy"),
        (("--shard", "2/2"), "--shard: 2/2: must be I/N"),
    ):
        done = preloaded.run(repo_root / "benchmarks" / "peers_cpu.py", *words, cwd=tmp_path)
        assert done.returncode == 2
        assert named in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
@torch.inference_mode()
def test_a_peer_computes_what_the_modules_compute(benchmark: Any, name: str) -> None:
    main = benchmark("peers_cpu")
    for package in main.MODULES[name]:
        pytest.importorskip(package)
    module, kind = main.CLASSES[name]
    model = tiny_model.build_model()
    peer = getattr(benchmark(module), kind)(model, "f32", 1)
    vision, plan, length = model.config.vision, plan_of(4), 11
    patches = torch.randn(3, vision.num_patches, vision.patch_values)
    masks = torch.tensor([0.0, 0.5, 1.0]).repeat(3, vision.num_patches // 3)
    features = model.vision(patches)
    (seen,) = peer.encode(3)(patches)
    torch.testing.assert_close(peer.numbers(seen), features, rtol=1e-4, atol=1e-4)
    (tokens,) = peer.project(3)(seen, masks)
    torch.testing.assert_close(peer.numbers(tokens), model.projector(features, masks), rtol=1e-4, atol=1e-4)
    x = torch.randn(1, length + 1, model.config.width)
    cache = KVCache.allocate(model.config, len(plan.steps), 1, length + 1, x)
    meant = model.prefill(x[:, :length], plan, cache)
    for given in (length, None):
        logits, *past = peer.prefill(plan, given)(x[:, :length])
        torch.testing.assert_close(peer.numbers(logits), meant, rtol=1e-4, atol=1e-4)
    for stored, one in zip((*cache.keys, *cache.values), (*past[::2], *past[1::2]), strict=True):
        torch.testing.assert_close(peer.numbers(one), stored[:, :, :length], rtol=1e-4, atol=1e-4)
    token = torch.tensor([7])
    logits, *_ = peer.decode(plan, length)(model.decoder.embedding[token][None].clone(), *past)
    meant = model.decode(token, plan, cache, length)
    torch.testing.assert_close(peer.numbers(logits), meant, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["f32", "f16"])
def test_a_file_for_llama_has_the_blocks_of_the_plan(benchmark: Any, tmp_path: Path, precision: str) -> None:
    gguf = pytest.importorskip("gguf")
    model, plan, path = tiny_model.build_model(), plan_of(4), tmp_path / "tiny.gguf"
    words = torch.randn(5, model.config.width)
    benchmark("peers_cpu_llama").write_gguf(path, model, plan, precision, words)
    reader = gguf.GGUFReader(path)
    assert reader.fields["olmoe.block_count"].contents() == 4
    assert reader.fields["olmoe.expert_used_count"].contents() == plan.steps[0].top_k
    weights = {one.name: torch.from_numpy(one.data.copy()).float() for one in reader.tensors}
    rows = model.config.embedding_size
    assert {name.split(".")[1] for name in weights if name.startswith("blk.")} == {"0", "1", "2", "3"}
    torch.testing.assert_close(weights["token_embd.weight"][rows:], words, rtol=1e-3, atol=1e-3)
    assert len(weights["output.weight"]) == rows + 5
    for i, block in enumerate(plan.blocks):
        check_block(weights, model, i, block)


def check_block(weights: dict[str, torch.Tensor], model: Molmo, place: int, index: int) -> None:
    """The block at a place of the file is that of the model."""
    block: Any = model.decoder.blocks[index]
    queries, keys, values = block.attention.qkv.weight.chunk(3)
    gate, up = block.moe.gate_up.chunk(2, dim=1)
    meant = {
        "attn_q": queries,
        "attn_k": keys,
        "attn_v": values,
        "ffn_gate_inp": block.moe.router.weight,
        "ffn_gate_exps": gate,
        "ffn_up_exps": up,
        "ffn_down_exps": block.moe.down,
    }
    for name, weight in meant.items():
        found = weights[f"blk.{place}.{name}.weight"]
        torch.testing.assert_close(found, weight.detach(), rtol=1e-3, atol=1e-3)
