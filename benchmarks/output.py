"""Writes a benchmark's result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tempovlm.core.paths import write_whole


def write_json(record: Any, path: Path | None) -> None:
    """Write a result to a file, whole or not at all; without a file to standard output.

    Raises:
        UserError: the file cannot be written.
    """
    text = json.dumps(record, indent=1)
    if path is None:
        print(text)
    else:
        write_whole(path, text + "\n")
