from __future__ import annotations

from pathlib import Path

import pytest

from tempovlm.testbed.make import make_testbed


@pytest.fixture(scope="session")
def small_bed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four data sets of a few pictures."""
    return make_testbed(tmp_path_factory.mktemp("beds") / "bed", 2, 3, seed=1, progress=False)
