"""Checkpoints in the published layout: names, strict shapes, experts stacked as they stream in.

Every tensor of a checkpoint is a view into a parameter of the model, so loading fills each place once and saving
writes the same views back. `hub` finds the files that hold the tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tempovlm.core.errors import UserError
from tempovlm.core.paths import read_json, scratch_folder
from tempovlm.model.config import ModelConfig
from tempovlm.model.family import VisionLanguageModel, class_of, family_of
from tempovlm.model.files.hub import SAFETENSORS_INDEX, WeightFile, checkpoint_files, indexed_file, open_weights
from tempovlm.model.prompt import Tokenizer

SHARD_BYTES = 15 << 20
"""A saved file stays under this, so that it fits a repository with a 16 MB limit."""

RANDOM_SHARD_BYTES = 2 << 30
"""Maximum size of a file of a random checkpoint: one is in memory at a time, twice while it is written."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")

_HASHED_WHOLE = 256 << 20
_HASHED_PART = 1 << 20
_HASHED_STEP = 64 << 20
_RANDOM_STD = 0.02

Advance = Callable[[int, int], None]
"""Callback with the bytes done and the total bytes."""


def empty_model(config: ModelConfig, device: torch.device | str, dtype: torch.dtype) -> VisionLanguageModel:
    """A model of the config's family with memory and no values; tables that no checkpoint stores are filled."""
    return _with_memory(_outline(config), device, dtype)


def _outline(config: ModelConfig) -> VisionLanguageModel:
    """A model that has shapes and no memory."""
    with torch.device("meta"):
        return class_of(config.model_type)(config)


def _with_memory(
    model: VisionLanguageModel, device: torch.device | str, dtype: torch.dtype
) -> VisionLanguageModel:
    # By `to_empty` it would be made like meta tensors, for which torch imports half a second of other code.
    torch.nn.Module._apply(model.to(dtype), lambda one: torch.empty(one.shape, dtype=one.dtype, device=device))
    model.fill_tables()
    return model.eval().requires_grad_(False)


def read_config(folder: Path) -> ModelConfig:
    """Read the `config.json` of a checkpoint folder.

    Raises:
        UserError: it cannot be read, is not JSON, or a field's value is wrong.
    """
    path = folder / "config.json"
    values = read_json(path, "a model folder holds config.json and safetensors files")
    return family_of(values, str(path)).config_class.from_hub(values, str(path))


def read_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """The `tokenizer.json` of a checkpoint folder.

    Raises:
        UserError: it cannot be read, or does not fit the model.
    """
    return class_of(config.model_type).tokenizer_class.load(folder / "tokenizer.json", config)


def load_model(
    folder: Path, device: torch.device | str, dtype: torch.dtype, advance: Advance | None = None
) -> VisionLanguageModel:
    """Load a checkpoint folder strictly; all headers are checked before memory is taken for the first weight.

    Host memory holds the model once when it is loaded to the CPU, and one small buffer when it is loaded to
    another device or type.

    Args:
        folder: folder in the published layout.
        device: destination of the model.
        dtype: type of the model, whatever the files hold.
        advance: called with bytes read and total bytes.

    Raises:
        UserError: a tensor is missing, unknown, duplicate or of another shape; names it and its file.
    """
    config, files = read_config(folder), checkpoint_files(folder)
    with ExitStack() as stack:
        sources = [stack.enter_context(open_weights(path)) for path in files]
        outline = _outline(config)
        check_tensors(sources, _shapes(outline), folder)
        views = (model := _with_memory(outline, device, dtype)).hub_views()
        total = sum(stored.nbytes for source in sources for stored in source.tensors.values())
        done = 0
        for source in sources:
            for name, stored in source.tensors.items():
                source.copy_to(name, views[name])
                done += stored.nbytes
                if advance is not None:
                    advance(done, total)
    return model


def check_tensors(sources: list[WeightFile], expected: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Raise a `UserError` that names the first tensor that differs from what the model expects."""
    seen: dict[str, Path] = {}
    for source in sources:
        for name, stored in source.tensors.items():
            where = f"{source.path}: tensor {name}"
            if name not in expected:
                raise UserError(f"{where} does not belong to this model")
            if name in seen:
                raise UserError(f"{where} is also in {seen[name].name}")
            if stored.shape != expected[name]:
                raise UserError(f"{where} has shape {stored.shape}, expected {expected[name]}")
            seen[name] = source.path
    missing = [name for name in expected if name not in seen]
    if missing:
        rest = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        place = indexed_file(folder, missing[0])
        raise UserError(f"{place}: tensor {missing[0]}{rest} missing; download the checkpoint again")


def save_model(model: VisionLanguageModel, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config and weights in the published layout, in files of at most `SHARD_BYTES`."""
    folder.mkdir(parents=True, exist_ok=True)
    views = model.hub_views()
    sizes = {name: view.numel() * dtype.itemsize for name, view in views.items()}

    def take(name: str) -> Tensor:
        return views[name].detach().to("cpu", dtype).contiguous().clone()

    write_shards(folder, sizes, take, SHARD_BYTES)
    (folder / "config.json").write_text(json.dumps(model.config.to_hub(), indent=2) + "\n", encoding="utf-8")


def write_random(
    folder: Path,
    config: ModelConfig,
    *,
    seed: int = 0,
    tokenizer: Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = RANDOM_SHARD_BYTES,
    device: torch.device | str = "cpu",
    advance: Advance | None = None,
) -> None:
    """Write a checkpoint of random weights in the published layout.

    The same seed writes the same values, on the same kind of device.

    Matrices are normal with the published standard deviation of 0.02, norms are 1, biases 0. An interrupted run
    leaves nothing behind.

    Args:
        folder: folder to make; it must not exist, or be empty.
        config: sizes of the model.
        seed: seed of the weights.
        tokenizer: a folder whose tokenizer files are copied beside the weights.
        dtype: type of the weights.
        shard_bytes: maximum bytes of a file.
        device: that draws the values; a GPU takes seconds where a CPU takes minutes.
        advance: called with bytes written and total bytes.

    Raises:
        UserError: the folder is not empty or cannot be written, or there is no tokenizer.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not empty; choose another folder or remove it")
    if tokenizer is not None and not (tokenizer / "tokenizer.json").is_file():
        raise UserError(f"{tokenizer}: holds no tokenizer.json")
    shapes = expected_shapes(config)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    generator, total, done = torch.Generator(device).manual_seed(seed), sum(sizes.values()), 0

    def draw(name: str) -> Tensor:
        nonlocal done
        done += sizes[name]
        if advance is not None:
            advance(done, total)
        return _random_tensor(name, shapes[name], dtype, generator)

    try:
        with scratch_folder(folder) as scratch:
            made = scratch / "model"
            made.mkdir()
            write_shards(made, sizes, draw, shard_bytes)
            (made / "config.json").write_text(json.dumps(config.to_hub(), indent=2) + "\n", encoding="utf-8")
            for name in TOKENIZER_FILES if tokenizer is not None else ():
                if (tokenizer / name).is_file():  # type: ignore[operator]
                    shutil.copyfile(tokenizer / name, made / name)  # type: ignore[operator]
            made.replace(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None


def _random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    owner, _, kind = name.rpartition(".")
    if kind == "weight" and owner.endswith(("norm", "ln_f", "pre_ln")):
        return torch.ones(shape, dtype=dtype)
    if kind == "bias":
        return torch.zeros(shape, dtype=dtype)
    return (
        torch.empty(shape, dtype=dtype, device=generator.device).normal_(0, _RANDOM_STD, generator=generator).cpu()
    )


def write_shards(folder: Path, sizes: Mapping[str, int], take: Callable[[str], Tensor], shard_bytes: int) -> None:
    """Write tensors, taken one after another, in files of at most `shard_bytes`, with an index for several."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if filled + size > shard_bytes and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    places: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: take(name) for name in names}, folder / file, metadata={"format": "pt"})
        # The library writes files that only their owner can read; weights are shared.
        (folder / file).chmod(0o644)
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(places.items()))}
        (folder / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def weights_hash(folder: Path) -> str:
    """Return twelve hex digits of the weights' bytes; stored in every profile, record and checkpoint.

    For weights over 256 MB, one megabyte in every 64 is read, and the files' beginnings, which hold all names and
    shapes, and their lengths: training changes every part of a model, and reading all of it would take longer
    than loading it.
    """
    digest = hashlib.sha256()
    files = checkpoint_files(folder)
    whole = sum(path.stat().st_size for path in files) <= _HASHED_WHOLE
    for path in files:
        with path.open("rb") as file:
            if whole:
                while chunk := file.read(_HASHED_PART):
                    digest.update(chunk)
                continue
            size = path.stat().st_size
            digest.update(size.to_bytes(8, "little"))
            for offset in range(0, size, _HASHED_STEP):
                file.seek(offset)
                digest.update(file.read(_HASHED_PART))
    return digest.hexdigest()[:12]


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the published name of every tensor with its shape, without allocating it."""
    return _shapes(_outline(config))


def _shapes(model: VisionLanguageModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(view.shape) for name, view in model.hub_views().items()}
