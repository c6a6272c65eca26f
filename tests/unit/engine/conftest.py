"""A company with rows on a CPU, and times of answers alone and in company."""

from __future__ import annotations

import pytest

from company_fakes import shared_profile, with_rows
from tempovlm.engine.engine import Engine
from tempovlm.latency.profile import LatencyProfile


@pytest.fixture
def crowded(engine: Engine) -> Engine:
    return with_rows(engine)


@pytest.fixture
def profile(engine: Engine) -> LatencyProfile:
    return shared_profile(engine)
