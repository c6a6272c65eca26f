"""Where the published files of MolmoE-1B without its weights are: beside the repository, or in a named folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[1]
FILES = next(
    (
        folder
        for folder in (
            Path(os.environ.get("TEMPOVLM_MOLMOE_FILES", "")),
            _ROOT / "shared" / "data" / "molmoe",
            _ROOT.parent / "shared" / "data" / "molmoe",
        )
        if (folder / "tokenizer.json").is_file()
    ),
    None,
)
"""The folder; None where they are not here."""

published = pytest.mark.skipif(
    FILES is None, reason="the published tokenizer.json is not here; name its folder in TEMPOVLM_MOLMOE_FILES"
)
