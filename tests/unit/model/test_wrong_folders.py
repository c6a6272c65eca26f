"""Model folders with something wrong in them: one line when loading, which names the file and the field."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_model
from tempovlm.api import load
from tempovlm.control.checkpoint import save_controller, write_tensors
from tempovlm.control.learned.networks import (
    Knob1PredictorBudgetLanguage,
    Knob2Knob3Predictor,
    SupervisedController,
)
from tempovlm.core.errors import UserError
from tempovlm.model.files.card import ModelCard
from tempovlm.model.files.hub import SAFETENSORS_INDEX
from tempovlm.model.prompt import Tokenizer
from tempovlm.model.weights import load_model, read_config, weights_hash, write_shards

SPACE, CONFIG = tiny_model.SPACE, tiny_model.CONFIG
COUNTS = {"num_top_ks": len(SPACE.top_ks), "num_block_counts": len(SPACE.block_counts)}
NAN, INF = float("nan"), float("inf")
WEIGHTS = "model-00001-of-00001.safetensors"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder, to be broken."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "broken"))


def told(folder: Path, *words: str) -> None:
    """Loading fails with one line that has all the words."""
    with pytest.raises(UserError) as error:
        load(str(folder), device="cpu", warmup=False, progress=False)
    text = str(error.value)
    assert "\n" not in text
    assert [word for word in words if word not in text] == [], text


def rewrite(path: Path, change: Callable[[Any], object]) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


WHOLE = (None, True, "16", 1.5, NAN, 0, -1, [4], {})
NUMBER = (None, False, "1e4", NAN, INF, 0, -1.0, [1.0], 10**400)

FIELDS: list[tuple[str, tuple[object, ...], str]] = [
    ("d_model", WHOLE, "not a whole number from 1 on"),
    ("d_model", (10**30,), "above 16777216"),
    ("n_layers", WHOLE, "not a whole number from 1 on"),
    ("n_layers", (10**9,), "above 1024"),
    ("n_heads", WHOLE, "not a whole number from 1 on"),
    ("n_heads", (7,), "does not divide d_model 48"),
    ("n_heads", (16,), "heads of an even width"),
    ("n_kv_heads", (2, "4", NAN), "only 4 is supported"),
    ("head_dim", (16,), "only 12 is supported"),
    ("moe_num_experts", WHOLE, "not a whole number from 1 on"),
    ("moe_top_k", WHOLE, "not a whole number from 1 on"),
    ("moe_top_k", (9,), "more than moe_num_experts, 8"),
    ("mlp_hidden_size", ("32", True, NAN, 0, -32, [32]), "not a positive, finite number"),
    ("mlp_hidden_size", (33, 0.5), "not an even number from 2 on"),
    ("embedding_size", WHOLE, "not a whole number from 1 on"),
    ("additional_vocab_size", (None, True, "0", 0.5, -1), "not a whole number from 0 on"),
    ("rope_theta", NUMBER, "not a positive, finite number"),
    ("layer_norm_eps", NUMBER, "not a positive, finite number"),
    ("max_sequence_length", WHOLE, "not a whole number from 1 on"),
    ("max_sequence_length", (10,), "a picture takes up to"),
    ("overlap_margins", (None, 2, "22", [2], [2, 2, 2], [2, 2.0], {}), "not a list of 2 whole numbers"),
    ("overlap_margins", ([-2, 2], [1, 2], [6, 6], [20, 20]), "multiples of image_pooling_h 2"),
    ("vit_layers", (None, -1, [], [-1, "2"], [True]), "not a list of one or more whole numbers"),
    ("vit_layers", ([-4], [3], [-1, 99]), "not all are among image_num_layers 3"),
    ("image_pooling_h", WHOLE, "not a whole number from 1 on"),
    ("image_pooling_h", (5,), "does not divide a crop's 12 patches a side"),
    ("image_pooling_w", (1, "2"), "only 2 is supported"),
    ("vision_backbone", (None, [], "x", 3), "not a table of fields"),
    ("model_type", ("llama", 3), "only 'molmo' is supported"),
    ("activation_type", ("gelu",), "only 'swiglu' is supported"),
    ("rope", (False,), "only True is supported"),
    ("clip_qkv", (8.0,), "only None is supported"),
    ("moe_shared_expert", (True,), "only False is supported"),
]

VISION_FIELDS: list[tuple[str, tuple[object, ...], str]] = [
    ("image_default_input_size", (None, 96, "96", [96], [96.0, 96.0]), "not a list of 2 whole numbers"),
    ("image_default_input_size", ([96, 88], [90, 90], [-96, -96], [0, 0], [8192, 8192]), "not a square"),
    ("image_patch_size", WHOLE, "not a whole number from 1 on"),
    ("image_patch_size", (7,), "whole patches of image_patch_size 7"),
    ("image_emb_dim", WHOLE, "not a whole number from 1 on"),
    ("image_num_layers", WHOLE, "not a whole number from 1 on"),
    ("image_num_layers", (1,), "not all are among image_num_layers 1"),
    ("image_num_heads", WHOLE, "not a whole number from 1 on"),
    ("image_num_heads", (5,), "does not divide image_emb_dim 32"),
    ("image_num_key_value_heads", (1,), "only 2 is supported"),
    ("image_head_dim", (8,), "only 16 is supported"),
    ("image_num_pos", (577,), "only 145 is supported"),
    ("image_pos_patch_size", (14,), "only 8 is supported"),
    ("image_mlp_dim", WHOLE, "not a whole number from 1 on"),
    ("image_norm_eps", NUMBER, "not a positive, finite number"),
    ("image_mlp_activations", ("gelu",), "only 'quick_gelu' is supported"),
]


def check_config(folder: Path) -> None:
    """What loading does with a config: its own checks, then those beside the tokenizer."""
    Tokenizer.load(folder / "tokenizer.json", read_config(folder))


@pytest.mark.parametrize(
    ("name", "value", "words", "table"),
    [
        (name, value, words, table)
        for table, rows in ((None, FIELDS), ("vision_backbone", VISION_FIELDS))
        for name, values, words in rows
        for value in values
    ],
)
def test_config_fields(name: str, value: object, words: str, table: str | None, folder: Path) -> None:
    path = folder / "config.json"
    rewrite(path, lambda record: (record[table] if table else record).update({name: value}))
    with pytest.raises(UserError) as error:
        check_config(folder)
    text = str(error.value)
    assert text.startswith(str(path))
    assert words in text
    assert "\n" not in text
    assert name in text


@pytest.mark.parametrize("name", ["d_model", "moe_top_k", "rope_theta", "vit_layers", "vision_backbone"])
def test_missing_config_fields(name: str, folder: Path) -> None:
    rewrite(folder / "config.json", lambda record: record.pop(name))
    told(folder, "config.json", f"field {name} is missing")


def test_what_published_files_say_more_is_read_over(folder: Path) -> None:
    more = {"n_kv_heads": None, "head_dim": 12, "clip_qkv": None, "max_crops": 12, "precision": "amp_bf16"}
    rewrite(folder / "config.json", lambda record: record.update(more))
    vision = {"image_num_pos": 145, "image_head_dim": 16, "image_model_type": "openai"}
    rewrite(folder / "config.json", lambda record: record["vision_backbone"].update(vision))
    assert read_config(folder) == CONFIG
    rewrite(folder / "config.json", lambda record: record.update(mlp_hidden_size=None, mlp_ratio=1))
    assert read_config(folder).expert_width == 24


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", WEIGHTS, "accuracy.json", "controller.pt"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("dangling", "a link to nowhere, which is missing"),
        ("loop", "which is missing"),
        ("folder", "a folder, where a file should be"),
        ("pipe", "not a file"),
        ("pointer", "a git-LFS pointer"),
        ("empty", ""),
        ("page", ""),
    ],
)
def test_files_that_are_none(name: str, kind: str, words: str, folder: Path) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    if kind in ("dangling", "loop"):
        path.symlink_to("nowhere" if kind == "dangling" else name)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes({"pointer": LFS.encode(), "empty": b"", "page": b"\xff\xfe<html>"}[kind])
    told(folder, str(path), words)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", WEIGHTS])
def test_files_that_may_not_be_read(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As told by the system, since a test that runs as root may read everything."""
    real = Path.open

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == name:
            raise PermissionError(13, "Permission denied")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    told(folder, str(folder / name), "cannot be read (Permission denied)")


@pytest.mark.parametrize("name", ["config.json", "accuracy.json", SAFETENSORS_INDEX])
def test_json_that_is_nested_beyond_reading(name: str, folder: Path) -> None:
    (folder / name).write_text("[" * 100_000)
    told(folder, str(folder / name), "not valid JSON")


def test_tokens_beyond_the_embedding(folder: Path) -> None:
    path = folder / "tokenizer.json"
    rewrite(path, lambda record: record["model"]["vocab"].update({"dog": 160}))
    told(folder, str(path), "token 'dog' has id 160, beyond the 160 rows", "embedding_size 160")


def test_added_tokens_beyond_the_embedding(folder: Path) -> None:
    """The library would give it the number of tokens before it and say nothing."""
    path = folder / "tokenizer.json"
    rewrite(path, lambda record: record["added_tokens"][-1].update(id=500))
    told(folder, str(path), "field added_tokens: <im_col> has id 500, but is read as")


def test_a_word_with_the_id_of_an_added_token(folder: Path) -> None:
    """Added tokens are numbered from the number of words, so that a gap gives the first one the last word's id."""

    def leave_a_gap(record: Any) -> None:
        vocab = record["model"]["vocab"]
        del vocab["dog"]
        for i, one in enumerate(record["added_tokens"]):
            one["id"] = len(vocab) + i

    rewrite(folder / "tokenizer.json", leave_a_gap)
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    last = max(vocab, key=vocab.__getitem__)
    told(folder, "tokenizer.json", "<|padding|>", f"{last!r}", f"have the same id {len(vocab)}")


def test_two_words_of_one_id(folder: Path) -> None:
    rewrite(folder / "tokenizer.json", lambda record: record["model"]["vocab"].update(dog=1))
    told(folder, "tokenizer.json", "'dog'", "have the same id 1")


def test_an_embedding_that_is_smaller_than_the_words(folder: Path) -> None:
    words = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    config = CONFIG.to_hub() | {"embedding_size": words - 3, "additional_vocab_size": 20}
    (folder / "config.json").write_text(json.dumps(config))
    told(
        folder, "tokenizer.json", "<|endoftext|>", "which the model cannot predict", f"embedding_size {words - 3}"
    )


@pytest.mark.parametrize("name", ["<|endoftext|>", "<|padding|>", "<im_patch>", "<im_col>"])
def test_a_tokenizer_without_a_control_token(name: str, folder: Path) -> None:
    def leave_out(record: Any) -> None:
        record["added_tokens"] = [one for one in record["added_tokens"] if one["content"] != name]
        for i, one in enumerate(record["added_tokens"]):
            one["id"] = len(record["model"]["vocab"]) + i

    rewrite(folder / "tokenizer.json", leave_out)
    told(folder, "tokenizer.json", f"control token {name} is missing")


def test_a_tokenizer_that_cannot_read_some_words(folder: Path) -> None:
    def leave_out(record: Any) -> None:
        del record["model"]["vocab"]["[unk]"]
        record["model"]["vocab"]["filler"] = 0

    rewrite(folder / "tokenizer.json", leave_out)
    told(folder, "tokenizer.json", "field model has no token for unknown text")


def test_a_tokenizer_that_cuts_and_pads(folder: Path) -> None:
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
           "pad_type_id": 0, "pad_token": "[unk]"}  # fmt: skip
    whole = Tokenizer.load(folder / "tokenizer.json").encode("what does the sign say")
    rewrite(folder / "tokenizer.json", lambda record: record.update(truncation=cut, padding=pad))
    assert Tokenizer.load(folder / "tokenizer.json").encode("what does the sign say") == whole
    assert len(whole) == 5


def shards(folder: Path) -> list[str]:
    """Write the weights in several files with an index; their names."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    write_shards(folder, sizes, tensors.__getitem__, sum(sizes.values()) // 3)
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_a_shard_that_lacks_a_tensor(folder: Path) -> None:
    shard = folder / shards(folder)[1]
    tensors = load_file(shard)
    lost = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, shard)
    told(folder, str(shard), f"tensor {lost} missing")


def test_a_listed_shard_that_is_no_file(folder: Path) -> None:
    shard = folder / shards(folder)[0]
    shard.unlink()
    told(folder, str(shard), "missing, though model.safetensors.index.json lists it")
    shard.symlink_to("blobs/gone")
    told(folder, str(shard), "a link to blobs/gone, which is missing")


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ({}, "names no files"),
        (None, "field weight_map is no table"),
        ([1], "field weight_map is no table"),
        ({"a": 1}, "a is 1, which is not a file beside it"),
        ({"a": ["x"]}, "a is ['x'], which is not a file beside it"),
        ({"a": "../x.safetensors"}, "which is not a file beside it"),
        ({"a": "x\0y"}, "which is not a file beside it"),
    ],
)
def test_an_index_of_wrong_form(places: object, words: str, folder: Path) -> None:
    (folder / SAFETENSORS_INDEX).write_text(json.dumps({"weight_map": places}))
    told(folder, SAFETENSORS_INDEX, words)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("shape", ["4"], "no list of whole numbers"),
        ("shape", [None, 2], "no list of whole numbers"),
        ("shape", [-1, -2], "no list of whole numbers"),
        ("shape", 4, "no list of whole numbers"),
        ("data_offsets", [0, 1, 2], "should have 2 numbers"),
        ("data_offsets", ["0", "8"], "no list of whole numbers"),
        ("data_offsets", [0, 10**30], "its header promises"),
        ("data_offsets", {}, "no list of whole numbers"),
        ("dtype", "I32", "not supported"),
        ("dtype", None, "not supported"),
        (None, 3, "its header cannot be read"),
    ],
)
def test_a_header_of_wrong_form(name: str | None, value: object, words: str, folder: Path) -> None:
    path = folder / WEIGHTS
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    some = next(key for key in header if key != "__metadata__")
    header[some] = value if name is None else header[some] | {name: value}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    told(folder, str(path), "damaged", words)


def test_tensors_that_share_bytes(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    text = json.dumps({"a": entry, "b": entry}).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    told(folder, WEIGHTS, "tensor b begins at byte 0, the one before it ends at 8")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({3: torch.zeros(1)}, "does not contain named tensors"),
        ({"a": torch.zeros(2, dtype=torch.int32)}, "tensor a is torch.int32"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "tensor a is torch.complex64"),
        ({"a": torch.zeros(2).to_sparse()}, "tensor a is torch.sparse_coo"),
    ],
)
def test_a_bin_of_wrong_form(content: object, words: str, folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save(content, folder / "pytorch_model.bin")
    told(folder, "pytorch_model.bin", words)


def test_sizes_that_no_memory_holds_are_compared_with_the_files_first(folder: Path) -> None:
    rewrite(folder / "config.json", lambda record: record.update(embedding_size=1 << 24, d_model=1 << 22))
    with pytest.raises(UserError, match=r"has shape .*, expected"):
        load_model(folder, "cpu", torch.float32)


def card() -> dict[str, Any]:
    rows = [{"tier": k.tier, "top_k": k.top_k, "num_blocks": k.num_blocks, "accuracy": 0.5} for k in SPACE]
    return {"settings": rows, "ranking": [5, 0, 3, 1, 2, 4], "output_tokens": {"counts": [0, 5, 3]}}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ranking", [0, 1, 2], "field ranking: block 3 is missing"),
        ("ranking", [0, 1, 2, 3, 4, 4], "field ranking: block 4 stands at places 5 and 6"),
        ("ranking", [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], "0.0 at place 1 is no block"),
        ("ranking", list(range(16)), "6 at place 7 is no block of this model; expected 0 to 5"),
        ("ranking", ["0", 1], "'0' at place 1 is no block"),
        ("ranking", "012345", "field ranking is '012345', no list of blocks"),
        ("output_tokens", 3, "damaged"),
        ("output_tokens", {"counts": [0, 0]}, "field output_tokens: counts is [0, 0]"),
        ("output_tokens", {"counts": [1, -1]}, "field output_tokens: counts is [1, -1]"),
        ("output_tokens", {"counts": [1.5]}, "field output_tokens: counts is [1.5]"),
        ("output_tokens", {"counts": "345"}, "field output_tokens: counts is '345'"),
        ("settings", None, "damaged"),
        ("settings", [3], "damaged"),
    ],
)
def test_a_card_of_wrong_form(name: str, value: object, words: str, folder: Path) -> None:
    path = folder / "accuracy.json"
    path.write_text(json.dumps(card()))
    assert ModelCard.read(folder, SPACE).length_counts == (0, 5, 3)
    rewrite(path, lambda record: record.update({name: value}))
    told(folder, str(path), words)


@pytest.mark.parametrize("value", [None, True, "0.5", NAN, INF, -0.1, 1.1, [0.5]])
def test_an_accuracy_that_is_none(value: object, folder: Path) -> None:
    record = card()
    record["settings"][3]["accuracy"] = value
    (folder / "accuracy.json").write_text(json.dumps(record))
    told(folder, "accuracy.json", f"field accuracy of {SPACE.settings[3]}", "not a number from 0 to 1")


def put_controller(folder: Path, **networks: torch.nn.Module) -> Path:
    kind = "supervised" if "controller" in networks else "two_stage"
    path, stamp = folder / "controller.pt", {"device": "cpu"}
    save_controller(
        path, kind=kind, networks=networks, space=SPACE, weights_hash=weights_hash(folder), stamp=stamp
    )
    return path


def test_a_controller_of_other_outputs(folder: Path) -> None:
    path = put_controller(
        folder, controller=SupervisedController(8, num_top_ks=3, num_block_counts=COUNTS["num_block_counts"])
    )
    told(folder, str(path), "field networks: controller has num_top_ks 3, where this model has 5")


@pytest.mark.parametrize(
    ("language", "vision", "words"),
    [(7, 96, "knob1 has language_width 7, where this model has 48"), (48, 9, "knob2knob3 has vision_width 9")],
)
def test_a_controller_of_other_features(language: int, vision: int, words: str, folder: Path) -> None:
    networks = {
        "knob1": Knob1PredictorBudgetLanguage(language, 8),
        "knob2knob3": Knob2Knob3Predictor(vision, 48, 8, **COUNTS),
    }
    told(folder, str(put_controller(folder, **networks)), "field networks", words)


def test_a_controller_whose_weights_are_no_numbers(folder: Path) -> None:
    net = SupervisedController(8, **COUNTS)
    next(net.parameters()).data.fill_(NAN)
    told(folder, str(put_controller(folder, controller=net)), "field networks: controller", "not finite")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("kind", [], "field kind is []"),
        ("networks", 3, "field networks cannot be used"),
        ("stamp", 3, "field stamp is no table"),
        ("schema", 3, "field schema"),
    ],
)
def test_a_controller_of_wrong_form(field: str, value: object, words: str, folder: Path) -> None:
    path = put_controller(folder, controller=SupervisedController(8, **COUNTS))
    record = torch.load(path, weights_only=True)
    write_tensors(path, record | {field: value})
    told(folder, str(path), words)
