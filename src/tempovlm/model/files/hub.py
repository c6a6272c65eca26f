"""Checkpoints as files: from a hub id to a folder, the weight files of a folder, and their tensors.

Tensors are read straight into their destination. `model.weights` says which ones there must be.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from tempovlm.core.checks import integer, shown, wrong_argument
from tempovlm.core.errors import UserError
from tempovlm.core.paths import check_file, is_there, read_json

SAFETENSORS_INDEX = "model.safetensors.index.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w-][\w.-]*", re.ASCII)
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK_BYTES = 32 << 20
_AGAIN = "download it again"
_NUMBERED = re.compile(r"-(\d+)-of-(\d+)\.(safetensors|bin)$")


def is_hub_id(model: str) -> bool:
    """Whether a name has the form `organisation/model`; a path that starts with `.`, `/` or `~` does not."""
    return _HUB_ID.fullmatch(model) is not None


def fetch(repo_id: str) -> Path:
    """Return the local folder of a hub model; downloads it if the hub's cache lacks it.

    `HF_HUB_CACHE`, `HF_HUB_OFFLINE` and the hub's other variables apply. If a repository has both, the
    safetensors are downloaded and the pickled weights are not.

    Raises:
        UserError: the hub cannot be reached and the cache lacks the model, or the hub refuses it.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    get = f"where the hub can be reached run: hf download {repo_id}, or give the path of a folder that has it"
    try:
        folder = Path(snapshot_download(repo_id, allow_patterns=["*.json", "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(repo_id, allow_patterns=["*.json", "pytorch_model*.bin"]))
    except GatedRepoError:
        raise wrong_argument(
            "model", repo_id, "the hub requires a login with access to it; run: hf auth login"
        ) from None
    except RepositoryNotFoundError:
        raise wrong_argument("model", repo_id, "no such folder, and no such model on the hub") from None
    except (OSError, ValueError, HfHubHTTPError) as error:
        if isinstance(error, FileNotFoundError | ConnectionError):
            why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
            where = f"no such folder, not in the cache {constants.HF_HUB_CACHE}, and {why}"
            raise wrong_argument("model", repo_id, f"{where}; {get}") from None
        raise wrong_argument("model", repo_id, f"the hub failed ({_first_line(error)}); {get}") from None
    return folder


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the weight files of a folder, in order.

    An index names them, and other files beside it are ignored; without one, `model.safetensors`, all
    safetensors files or `pytorch_model.bin` are taken, in this order of preference.

    Raises:
        UserError: there are none, one cannot be read, one that an index or a numbering names is missing, or an
            index is damaged.
    """
    for index in (SAFETENSORS_INDEX, PICKLE_INDEX):
        if is_there(folder / index):
            return _listed(folder / index)
        single = folder / index.removesuffix(".index.json")
        pattern = "*.safetensors" if index == SAFETENSORS_INDEX else "pytorch_model-*.bin"
        if files := [single] if is_there(single) else _numbered(sorted(folder.glob(pattern))):
            for path in files:
                check_file(path, _AGAIN)
            return files
    raise UserError(f"{folder}: no weights (safetensors or pytorch_model.bin); is this a model folder?")


def _listed(index: Path) -> list[Path]:
    files = [index.parent / name for name in sorted(set(_places(index).values()))]
    if not files:
        raise UserError(f"{index}: field weight_map names no files; {_AGAIN}")
    for file in files:
        if not is_there(file):
            raise UserError(f"{file}: missing, though {index.name} lists it; {_AGAIN}")
        check_file(file, _AGAIN)
    return files


def _places(index: Path) -> dict[str, str]:
    """Return, for each tensor's name, the name of the file beside the index."""
    record = read_json(index, _AGAIN)
    places = record.get("weight_map") if isinstance(record, dict) else None
    if not isinstance(places, dict):
        raise UserError(f"{index}: damaged index, field weight_map is no table; {_AGAIN}")
    found: set[str] = set()
    for name, file in places.items():
        if not isinstance(file, str) or (file not in found and (Path(file).name != file or "\0" in file)):
            raise UserError(f"{index}: field weight_map: {name} is {file!r}, which is not a file beside it")
        found.add(file)
    return places


def indexed_file(folder: Path, tensor: str) -> Path:
    """Return the file that the folder's index names for a tensor; the folder without an index or a name."""
    for index in (SAFETENSORS_INDEX, PICKLE_INDEX):
        if is_there(folder / index):
            return folder / _places(folder / index).get(tensor, "")
    return folder


def _numbered(files: list[Path]) -> list[Path]:
    """Return the same files, if none of a series `…-00001-of-00003` is missing."""
    have = {path.name for path in files}
    for path in files:
        if found := _NUMBERED.search(path.name):
            stem, count = path.name[: found.start()], int(found[2])
            for i in range(1, count + 1):
                name = f"{stem}-{i:0{len(found[1])}d}-of-{found[2]}.{found[3]}"
                if name not in have:
                    raise UserError(f"{path.parent / name}: missing, one of {count} files; download it again")
    return files


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file; `offset` counts bytes from the file's start (0 where the file is mapped)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Number of bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightFile(Protocol):
    """Protocol of an open file of weights."""

    path: Path
    tensors: dict[str, Stored]
    """Tensors by name, in the order in which reading is fastest."""

    def copy_to(self, name: str, place: Tensor) -> None:
        """Fill `place`, a tensor of the same shape and any type and device."""


@contextmanager
def open_weights(path: Path) -> Iterator[WeightFile]:
    """Open a safetensors or pickled file, and check from its header that it is complete.

    Raises:
        UserError: it is damaged, half-written, or of another kind; names it.
    """
    if path.suffix == ".bin":
        yield _PickleFile(path)
        return
    try:
        file = path.open("rb", buffering=0)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    with file:
        yield _SafetensorsFile(path, file)


class _SafetensorsFile:
    """Reads each tensor with plain reads into its destination.

    A memory map would count, page by page, as this process's memory beside the model itself, and copying from
    it would touch every byte twice. The format: github.com/huggingface/safetensors, section Format.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._file = file
        self._buffer: Tensor | None = None
        self.tensors = self._read_header()

    def _read_header(self) -> dict[str, Stored]:
        size = self.path.stat().st_size
        length = int.from_bytes(self._file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise self._damaged(f"{size} bytes hold no header")
        try:
            header: dict[str, Any] = json.loads(self._file.read(length))
            header.pop("__metadata__", None)
            ends = {name: _whole_numbers(entry["data_offsets"], 2) for name, entry in header.items()}
            order = sorted(ends, key=lambda name: ends[name])
            found = {
                name: Stored(
                    _DTYPES[header[name]["dtype"]],
                    _whole_numbers(header[name]["shape"]),
                    8 + length + ends[name][0],
                )
                for name in order
            }
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged(f"its header cannot be read: {error}") from None
        except KeyError as key:
            raise self._damaged(f"its header lacks {key}, or that type of number is not supported") from None
        whole = 8 + length + max((end for _, end in ends.values()), default=0)
        if whole != size:
            raise self._damaged(f"{size} bytes, its header promises {whole}")
        done = 0
        for name in order:
            start, end = ends[name]
            if found[name].nbytes != end - start:
                raise self._damaged(f"tensor {name} has {end - start} bytes, its shape needs {found[name].nbytes}")
            if start != done:
                raise self._damaged(f"tensor {name} begins at byte {start}, the one before it ends at {done}")
            done = end
        return found

    def _damaged(self, why: str) -> UserError:
        return UserError(f"{self.path}: damaged or half-written safetensors file ({why}); download it again")

    def copy_to(self, name: str, place: Tensor) -> None:
        stored = self.tensors[name]
        self._file.seek(stored.offset)
        if not place.is_contiguous():
            place.copy_(self._filled(torch.empty(stored.shape, dtype=stored.dtype)))
        elif place.device.type == "cpu" and place.dtype == stored.dtype:
            self._filled(place)
        else:
            if self._buffer is None or self._buffer.dtype != stored.dtype:
                self._buffer = torch.empty(_CHUNK_BYTES // stored.dtype.itemsize, dtype=stored.dtype)
            for part in place.view(-1).split(len(self._buffer)):
                part.copy_(self._filled(self._buffer[: len(part)]))

    def _filled(self, tensor: Tensor) -> Tensor:
        """Return a contiguous tensor in host memory, filled with the next bytes of the file."""
        # A tensor's bytes are only reachable through numpy, which lacks bfloat16: hence the view as bytes.
        rest = memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        while rest:
            try:
                count = self._file.readinto(rest)  # type: ignore[attr-defined]
            except OSError as error:
                raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None
            if not count:
                raise self._damaged("it ends early")
            rest = rest[count:]
        return tensor


class _PickleFile:
    """A `pytorch_model.bin`: mapped, and unpickled with weights only, so that it can run no code."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            reason = _first_line(error)
            raise UserError(f"{path}: damaged, half-written or not a file of weights ({reason})") from None
        if not isinstance(content, dict) or not all(
            isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
        ):
            raise UserError(f"{path}: does not contain named tensors")
        for name, tensor in content.items():
            if tensor.dtype not in _DTYPES.values() or tensor.layout != torch.strided:
                kind = f"{tensor.layout} of {tensor.dtype}".removeprefix("torch.strided of ")
                raise UserError(f"{path}: tensor {name} is {kind}, which is not supported")
        self._content: dict[str, Tensor] = content
        self.tensors = {name: Stored(tensor.dtype, tuple(tensor.shape)) for name, tensor in content.items()}

    def copy_to(self, name: str, place: Tensor) -> None:
        # Removed, so that a file whose tensors are all placed keeps no memory.
        place.copy_(self._content.pop(name))


def _whole_numbers(values: Any, count: int | None = None) -> tuple[int, ...]:
    """Return a header's list of sizes or of places.

    Raises:
        ValueError: it is not such a list.
    """
    if not isinstance(values, list) or not all(integer(one) is not None and one >= 0 for one in values):
        raise ValueError(f"{shown(repr(values))} is no list of whole numbers from 0 on")
    if count is not None and len(values) != count:
        raise ValueError(f"{shown(repr(values))} should have {count} numbers")
    return tuple(values)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
