"""Result files of no real measurement, as tests write them into a repository of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stamps import STAMP

SHIPPED = STAMP.weights
"""Hash of the weights that the tests' pocket ships with."""


def put(repository: Path, path: str, record: Any) -> Path:
    file = repository / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(record if isinstance(record, str) else json.dumps(record), encoding="utf-8")
    return file


def stamp(**fields: Any) -> dict[str, Any]:
    return STAMP.to_json() | {"model": "pocket"} | fields
