"""Stored results of golden tests: rounded when they are written, and compared with a tolerance."""

from __future__ import annotations

import json
import math
import numbers
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, record: Mapping[str, Any]) -> None:
    """One line for every second-level entry, so that a change shows where it is."""
    parts = []
    for name, value in _rounded(record).items():
        if isinstance(value, dict):
            rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items())
            parts.append(f" {json.dumps(name)}: {{\n{rows}\n }}")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(value)}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    sys.stdout.write(f"{path}\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _rounded(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return round(value, 6) if isinstance(value, float) and math.isfinite(value) else value


def differences(found: Any, stored: Any, rel: float, least: float, at: str = "") -> Iterator[str]:
    """Where two results differ: numbers by more than `rel` of the stored one and `least`, all else at all."""
    if isinstance(found, Mapping) and isinstance(stored, Mapping):
        found = {str(name): one for name, one in found.items()}
        for name in {**found, **stored}:
            if name in found and name in stored:
                yield from differences(found[name], stored[name], rel, least, f"{at}/{name}")
            else:
                yield f"{at}/{name}: only {'found' if name in found else 'stored'}"
    elif isinstance(found, list | tuple) and isinstance(stored, list) and len(found) == len(stored):
        for i, (one, other) in enumerate(zip(found, stored, strict=True)):
            yield from differences(one, other, rel, least, f"{at}/{i}")
    elif isinstance(found, numbers.Real) and isinstance(stored, numbers.Real):
        if found != pytest.approx(stored, rel=rel, abs=least):
            yield f"{at}: {found}, stored is {stored}"
    elif found != stored:
        yield f"{at}: {found!r}, stored is {stored!r}"
