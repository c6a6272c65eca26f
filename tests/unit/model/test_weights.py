"""Checkpoints in every form that people have them, and every way in which one can be broken."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_model
from tempovlm.core.errors import UserError
from tempovlm.model.config import MOLMOE_1B
from tempovlm.model.files.hub import SAFETENSORS_INDEX, checkpoint_files
from tempovlm.model.vlm import Molmo
from tempovlm.model.weights import (
    expected_shapes,
    load_model,
    read_config,
    save_model,
    weights_hash,
    write_random,
    write_shards,
)

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model() -> Molmo:
    return tiny_model.build_model()


@pytest.fixture
def tensors(model: Molmo) -> Tensors:
    return {name: view.clone() for name, view in model.hub_views().items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder without weights."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(tiny_model.CONFIG.to_hub()))
    return path


def write_sharded(folder: Path, tensors: Tensors, count: int = 3) -> list[str]:
    """Write `count` files or one more, with an index; returns their names."""
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    write_shards(folder, sizes, tensors.__getitem__, sum(sizes.values()) // count)
    return sorted(path.name for path in folder.glob("*.safetensors"))


def same(a: Molmo, b: Molmo, dtype: torch.dtype = torch.float32) -> bool:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(x.dtype == dtype and torch.equal(x, y.to(dtype)) for x, y in pairs)


@pytest.mark.parametrize("layout", ["single", "sharded", "no_index", "bin", "sharded_bin"])
def test_every_layout_loads(layout: str, folder: Path, tensors: Tensors, model: Molmo) -> None:
    if layout == "single":
        save_file(tensors, folder / "model.safetensors")
        save_file({"x": torch.zeros(1)}, folder / "consolidated.safetensors")
    elif layout in ("sharded", "no_index"):
        write_sharded(folder, tensors)
        if layout == "no_index":
            (folder / SAFETENSORS_INDEX).unlink()
        else:
            save_file({"x": torch.zeros(1)}, folder / "other.safetensors")
    elif layout == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        names = sorted(tensors)
        parts = {f"pytorch_model-{i + 1:05d}-of-00002.bin": names[i::2] for i in range(2)}
        for file, part in parts.items():
            torch.save({name: tensors[name] for name in part}, folder / file)
        places = {name: file for file, part in parts.items() for name in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    seen: list[tuple[int, int]] = []
    loaded = load_model(folder, "cpu", torch.float32, lambda done, total: seen.append((done, total)))
    assert same(loaded, model)
    assert seen[-1][0] == seen[-1][1] == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64])
def test_types_are_converted(stored: torch.dtype, folder: Path, tensors: Tensors, model: Molmo) -> None:
    save_file({name: tensor.to(stored) for name, tensor in tensors.items()}, folder / "model.safetensors")
    loaded = load_model(folder, "cpu", torch.bfloat16)
    assert same(loaded, model, torch.bfloat16)
    assert loaded.decoder.rotary.cos.dtype == torch.float32


def test_long_tensors_are_read_in_pieces(
    folder: Path, tensors: Tensors, model: Molmo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempovlm.model.files.hub._CHUNK_BYTES", 4 * 1000)
    save_file(tensors, folder / "model.safetensors")
    assert same(load_model(folder, "cpu", torch.bfloat16), model, torch.bfloat16)


def test_strict(folder: Path, tensors: Tensors) -> None:
    path = folder / "model.safetensors"
    gate = "model.transformer.blocks.3.mlp.experts.5.gate_proj.weight"

    def fails(changed: Tensors, *words: str) -> None:
        save_file(changed, path)
        with pytest.raises(UserError) as error:
            load_model(folder, "cpu", torch.float32)
        assert all(word in str(error.value) for word in (str(folder), *words))
        assert "\n" not in str(error.value)

    fails({name: t for name, t in tensors.items() if name != gate}, gate, "missing")
    fails(tensors | {"model.rotary.inv_freq": torch.zeros(3)}, "model.rotary.inv_freq", "does not belong")
    fails(tensors | {gate: torch.zeros(16, 47)}, gate, "(16, 47)", "(16, 48)")
    fails(tensors | {gate: torch.zeros(16, 48, dtype=torch.int32)}, str(path), "not supported")


def test_a_tensor_in_two_files(folder: Path, tensors: Tensors) -> None:
    names = write_sharded(folder, tensors)
    again = next(iter(load_file(folder / names[0])))
    last = load_file(folder / names[-1]) | {again: tensors[again]}
    save_file(last, folder / names[-1])
    with pytest.raises(UserError, match=f"{again} is also in {names[0]}"):
        load_model(folder, "cpu", torch.float32)


@pytest.mark.parametrize("keep", [0, 5, 60, 5000, -1])
def test_half_written_safetensors(keep: int, folder: Path, tensors: Tensors) -> None:
    path = folder / "model.safetensors"
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"^{path}: damaged or half-written[^\n]*$"):
        load_model(folder, "cpu", torch.float32)


@pytest.mark.parametrize("keep", [0, 5, 5000, -1])
def test_half_written_bin(keep: int, folder: Path, tensors: Tensors) -> None:
    path = folder / "pytorch_model.bin"
    torch.save(tensors, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"^{path}: damaged, half-written[^\n]*$"):
        load_model(folder, "cpu", torch.float32)


def test_a_bin_runs_no_code(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    torch.save({"x": Path("/")}, path)
    with pytest.raises(UserError, match=str(path)):
        load_model(folder, "cpu", torch.float32)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(UserError, match="does not contain named tensors"):
        load_model(folder, "cpu", torch.float32)


def test_missing_files(folder: Path, tensors: Tensors) -> None:
    with pytest.raises(UserError, match="no weights"):
        checkpoint_files(folder)
    names = write_sharded(folder, tensors)
    (folder / names[1]).unlink()
    with pytest.raises(UserError, match=rf"{names[1]}: missing, though model.safetensors.index.json lists it"):
        checkpoint_files(folder)
    (folder / SAFETENSORS_INDEX).unlink()
    with pytest.raises(UserError, match=rf"{names[1]}: missing, one of {len(names)} files"):
        checkpoint_files(folder)
    for content in ("{", "[]", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../b.safetensors"}}'):
        (folder / SAFETENSORS_INDEX).write_text(content)
        with pytest.raises(UserError, match=SAFETENSORS_INDEX):
            checkpoint_files(folder)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("n_layers", "16", "field n_layers is '16', not a whole number from 1 on"),
        ("n_heads", 0, "field n_heads is 0, not a whole number from 1 on"),
        ("d_model", 1.5, "field d_model is 1.5, not a whole number from 1 on"),
        ("overlap_margins", 2, "field overlap_margins is 2, not a list of 2 whole numbers"),
        ("vision_backbone", [], "field vision_backbone is [], not a table of fields"),
    ],
)
def test_fields_of_wrong_values_are_named(folder: Path, name: str, value: object, message: str) -> None:
    fields = tiny_model.CONFIG.to_hub() | {name: value}
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=re.escape(message)):
        read_config(folder)


def test_a_configuration_that_is_no_table(folder: Path) -> None:
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json: damaged"):
        read_config(folder)


def test_configurations_that_cannot_be_read(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_model(folder, "cpu", torch.float32)
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is missing; is this a Molmo checkpoint"):
        load_model(folder, "cpu", torch.float32)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="missing; a model folder holds"):
        load_model(folder, "cpu", torch.float32)


def test_save_and_load(tmp_path: Path, model: Molmo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempovlm.model.weights.SHARD_BYTES", 300_000)
    save_model(model, tmp_path / "saved", torch.float32)
    files = checkpoint_files(tmp_path / "saved")
    assert len(files) > 2
    assert all(path.stat().st_size < 330_000 for path in files)
    assert same(load_model(tmp_path / "saved", "cpu", torch.float32), model)


def test_the_full_model_has_the_published_tensors() -> None:
    shapes = expected_shapes(MOLMOE_1B)
    assert len(shapes) == 3573
    assert shapes["model.transformer.blocks.15.mlp.experts.63.down_proj.weight"] == (2048, 1024)
    assert shapes["model.vision_backbone.image_vit.patch_embedding.weight"] == (1024, 588)


def test_random(tmp_path: Path, tiny_folder: Path) -> None:
    config = replace(tiny_model.CONFIG, num_blocks=3)
    calls: list[tuple[int, int]] = []
    (tmp_path / ".a.partial-a1b2c3d4" / "model").mkdir(parents=True)  # a killed run left it
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = tmp_path / name
        write_random(
            out, config, seed=seed, tokenizer=tiny_folder, shard_bytes=200_000, advance=lambda *x: calls.append(x)
        )
    index = json.loads((tmp_path / "a" / SAFETENSORS_INDEX).read_text())
    assert set(index["weight_map"]) == set(expected_shapes(config))
    assert index["metadata"]["total_size"] == calls[-1][0] == calls[-1][1]
    assert (tmp_path / "a" / "tokenizer.json").is_file()
    a, b, c = (load_model(tmp_path / name, "cpu", torch.bfloat16) for name in "abc")
    assert same(a, b, torch.bfloat16)
    assert not same(a, c, torch.bfloat16)
    assert bool((a.decoder.norm.weight == 1).all())
    assert 0.015 < float(a.decoder.head.weight.float().std()) < 0.025
    assert weights_hash(tmp_path / "a") == weights_hash(tmp_path / "b") != weights_hash(tmp_path / "c")
    with pytest.raises(UserError, match="not empty"):
        write_random(tmp_path / "a", config)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        write_random(tmp_path / "d", config, tokenizer=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_the_hash_of_large_weights_samples_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(bytes(5000))
    whole = weights_hash(folder)
    monkeypatch.setattr("tempovlm.model.weights._HASHED_WHOLE", 1000)
    monkeypatch.setattr("tempovlm.model.weights._HASHED_PART", 100)
    monkeypatch.setattr("tempovlm.model.weights._HASHED_STEP", 1000)
    sampled = weights_hash(folder)
    assert sampled != whole
    path.write_bytes(bytes(5001))
    assert weights_hash(folder) != sampled
    path.write_bytes(bytes(2000) + b"x" + bytes(2999))
    assert weights_hash(folder) != sampled


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak as Linux gives it")
def test_no_second_copy_in_memory(tmp_path: Path) -> None:
    """The peak above what torch and an empty interpreter take is the model and little else."""
    config = replace(tiny_model.CONFIG, width=240, num_experts=64, expert_width=256, num_blocks=10)
    write_random(tmp_path / "model", config, shard_bytes=100 << 20)
    code = (
        "import resource, sys, torch; from pathlib import Path; from tempovlm.model.weights import load_model\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        f"load_model(Path({str(tmp_path / 'tiny')!r}), 'cpu', torch.bfloat16)\n"
        f"before = peak(); model = load_model(Path({str(tmp_path / 'model')!r}), 'cpu', torch.bfloat16)\n"
        "print((peak() - before) / sum(p.nbytes for p in model.parameters()))"
    )
    write_random(tmp_path / "tiny", tiny_model.CONFIG)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.2
