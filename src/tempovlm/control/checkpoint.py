"""Files of learned controllers: tensors and plain values, bound to a knob space and to a model's weights.

A controller's outputs are indices into a knob space, and its inputs are features of one model. A file records both
and is refused if either differs. A file of the second stage also holds the first, so that it works alone.
This module defines the parts of each kind; training is elsewhere.
"""

from __future__ import annotations

import importlib
import io
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tempovlm.control.baselines import NUM_FEATURES, LinUCB, NearestNeighbours
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobSpace
from tempovlm.core.paths import write_whole

SCHEMA = "tempovlm.controller/1"

PARTS: dict[str, tuple[str, ...]] = {
    "supervised": ("controller",),
    "two_stage_stage1": ("knob1",),
    "two_stage": ("knob1", "knob2knob3"),
    "llm_based": ("controller",),
    "value": ("accuracy",),
    "seen_value": ("accuracy", "seen"),
    "nearest_neighbours": ("scorer",),
    "linucb": ("scorer",),
}
"""Kind of controller → the names of its parts."""

_NETWORKS = "tempovlm.control.learned.networks"
CLASSES: dict[str, str] = {
    "SupervisedController": _NETWORKS,
    "Knob1PredictorBudget": _NETWORKS,
    "Knob1PredictorBudgetLanguage": _NETWORKS,
    "Knob1PredictorBudgetLanguageGlance": _NETWORKS,
    "Knob2Knob3Predictor": _NETWORKS,
    "AccuracyNetwork": _NETWORKS,
    "SeenAccuracyNetwork": _NETWORKS,
    "LLMBasedController": "tempovlm.control.learned.llm_based",
    "NearestNeighbours": "tempovlm.control.baselines",
    "LinUCB": "tempovlm.control.baselines",
}
"""Class of a part → the module that defines it. Nothing else is ever built from a file."""

Part = nn.Module | NearestNeighbours | LinUCB
"""A part of a controller: a network in evaluation mode, or the arrays of a baseline."""

_READ_ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    pickle.UnpicklingError,
)
"""Exceptions that torch raises on damaged files."""

_FIELDS = ("kind", "networks", "space", "knob_space", "weights", "stamp", "options", "metrics")


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedController:
    """The content of a controller file.

    Attributes:
        kind: one of `PARTS`. networks: by name, in evaluation mode.
        weights_hash: hash of the weights of the model whose features it reads; None if it reads none.
        stamp: of the measurements that it learned from. options: of its training. metrics: its results.
    """

    kind: str
    networks: Mapping[str, Part]
    weights_hash: str | None = None
    stamp: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)


def save_controller(
    path: Path,
    *,
    kind: str,
    networks: Mapping[str, Part],
    space: KnobSpace,
    weights_hash: str | None = None,
    stamp: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a controller atomically.

    Args:
        path: the file.
        kind: one of `PARTS`; decides which networks must be given.
        networks: by name; each has `sizes`, the keyword arguments of its constructor.
        space: the settings that its outputs index.
        weights_hash: hash of the model's weights; None for a controller that reads no features of a model.
        stamp: stamp of the measurements that it learned from.
        options: options of its training; values that are not plain are written as text.
        metrics: results of its training.
        dtype: in which matrices are stored, to be read as float32; None stores them as they are.

    Raises:
        UserError: the folder cannot be written.
    """
    if set(networks) != set(PARTS[kind]):
        raise ValueError(f"kind {kind} has the networks {PARTS[kind]}, not {tuple(networks)}")
    record = {
        "schema": SCHEMA,
        "kind": kind,
        "networks": {name: _record(net, dtype) for name, net in networks.items()},
        "space": space.to_json(),
        "knob_space": space.fingerprint,
        "weights": weights_hash,
        "stamp": _plain(stamp),
        "options": _plain(options),
        "metrics": _plain(metrics),
    }
    write_tensors(path, record)


def _record(net: Part, dtype: torch.dtype | None) -> dict[str, Any]:
    name = type(net).__name__
    if name not in CLASSES:
        raise ValueError(f"{name} is not among the classes that a file may hold")
    sizes = getattr(net, "sizes", {})
    state = {key: value.detach().cpu().clone() for key, value in net.state_dict().items()}
    if dtype is not None:
        state = {key: value.to(dtype) if value.ndim > 1 else value for key, value in state.items()}
    return {"class": name, "sizes": dict(sizes), "state": state}


def _plain(values: Mapping[str, Any] | None) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(dict(values or {}), default=str))
    return plain


def write_tensors(path: Path, record: Mapping[str, Any]) -> None:
    """Write tensors and plain values atomically; makes missing folders.

    Raises:
        UserError: the folder cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(dict(record), buffer)
    write_whole(path, buffer.getvalue())


def read_tensors(path: Path, what: str) -> dict[str, Any]:
    """Read a file of tensors and plain values; runs no code from it.

    Args:
        path: the file.
        what: name of the expected content, for the message.

    Raises:
        UserError: the file is missing, truncated, or of another format.
    """
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the path of a {what}") from None
    except _READ_ERRORS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: damaged, or no {what} ({reason[:120]})") from None
    if not isinstance(record, dict):
        raise UserError(f"{path}: no {what}, but a {type(record).__name__}")
    return record


def load_controller(path: Path, space: KnobSpace, weights_hash: str | None = None) -> SavedController:
    """Read a file that `save_controller` wrote.

    Args:
        path: the file.
        space: knob space of the caller's model.
        weights_hash: hash of the caller's weights; None skips this check.

    Raises:
        UserError: the file is missing, damaged, of an unknown kind, knob space or model, or a network has other
            outputs or weights that are not finite.
    """
    record = _read_record(path)
    kind = record["kind"]
    if not isinstance(kind, str) or kind not in PARTS:
        raise UserError(f"{path}: field kind is {kind!r}, which is unknown; known are {', '.join(PARTS)}")
    if record["knob_space"] != space.fingerprint:
        raise UserError(
            f"{path}: field knob_space is {record['knob_space']}, this model's is {space.fingerprint}: trained "
            "for other settings; allow those alone (--tiers, --top_k, --num_blocks, or load(space=...)), or train "
            "a controller for this model"
        )
    if None not in (weights_hash, record["weights"]) and record["weights"] != weights_hash:
        raise UserError(
            f"{path}: field weights is {record['weights']}, this model's is {weights_hash}: trained on another "
            "model's features; train a controller for this model"
        )
    try:
        networks = {name: _built(record["networks"][name]) for name in PARTS[kind]}
        extra = {name: dict(record[name]) for name in ("stamp", "options", "metrics")}
    except (*_READ_ERRORS, ImportError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: damaged, field networks cannot be used ({reason[:120]})") from None
    for name, net in networks.items():
        _check_network(path, name, net, space)
    return SavedController(kind=kind, networks=networks, weights_hash=record["weights"], **extra)


def check_sizes(path: Path, name: str, net: Part, expected: Mapping[str, int]) -> None:
    """Raise a `UserError` if a network's size differs from the expected one."""
    for size, ours in expected.items():
        found = getattr(net, "sizes", {}).get(size, ours)
        if found != ours:
            raise UserError(f"{path}: field networks: {name} has {size} {found}, where this model has {ours}")


def _check_network(path: Path, name: str, net: Part, space: KnobSpace) -> None:
    """Raise a `UserError` unless a network has one output for each knob value and finite weights."""
    counts = {**space.counts, "num_settings": len(space), "num_features": NUM_FEATURES}
    check_sizes(path, name, net, counts)
    for key, values in net.state_dict().items():
        if not bool(torch.isfinite(values).all()):
            raise UserError(f"{path}: field networks: {name}: {key} holds values that are not finite")


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The knob space, the model's weights and the kind of device (`cpu` or `cuda`) that a file was trained for.

    The weights are those whose features it reads, else those that were measured; None if the file names none.
    """

    knob_space: str
    weights_hash: str | None
    device: str | None


@dataclass(frozen=True, slots=True)
class Origin:
    """The kind of a controller and the options of its training."""

    kind: str
    options: Mapping[str, Any]


def origin(path: Path) -> Origin:
    """Read of which kind a controller is and how it was trained, without building it.

    Raises:
        UserError: the file is missing, damaged, or of another format.
    """
    record = _read_record(path)
    options = record["options"]
    return Origin(str(record["kind"]), options if isinstance(options, dict) else {})


def fingerprint(path: Path) -> Fingerprint:
    """Read what a controller was trained for, without building it.

    Raises:
        UserError: the file is missing, damaged, or of another format.
    """
    record = _read_record(path)
    stamp = record["stamp"]
    if not isinstance(stamp, dict):
        raise UserError(f"{path}: damaged, field stamp is no table; train the controller again")
    device = stamp.get("device")
    return Fingerprint(
        str(record["knob_space"]),
        record["weights"] or stamp.get("weights"),
        None if device is None else str(device).partition("/")[0],
    )


def _read_record(path: Path) -> dict[str, Any]:
    """Return the fields of a file after checking that all are there."""
    record = read_tensors(path, "controller checkpoint")
    if record.get("schema") != SCHEMA:
        raise UserError(
            f"{path}: field schema is not {SCHEMA}; give a checkpoint of a controller, or train it again"
        )
    missing = [name for name in _FIELDS if name not in record]
    if missing:
        raise UserError(f"{path}: field {missing[0]} is missing; train the controller again")
    return record


def _built(record: Mapping[str, Any]) -> Part:
    name = record["class"]
    cls = getattr(importlib.import_module(CLASSES[name]), name)
    state: dict[str, Tensor] = record["state"]
    if not issubclass(cls, nn.Module):
        baseline: NearestNeighbours | LinUCB = cls.from_state(state)
        return baseline
    net: nn.Module = cls(**record["sizes"])
    net.load_state_dict(state)
    return net.eval().requires_grad_(False)
