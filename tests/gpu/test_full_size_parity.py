"""The full-size MolmoE-1B in bfloat16 as the engine serves it, against float32 and the published implementation.

Weights, prompts and forced tokens are the same everywhere. `TEMPOVLM_PARITY_JSON` names a file that keeps the
figures; `TEMPOVLM_REFERENCE` a checkout of the published implementation, without which float32 stands for it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tempovlm.model.config import MOLMOE_1B

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LIMIT = 2e-2
NEEDED_BYTES = 60 << 30


@pytest.fixture(scope="module")
def record(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The figures of `benchmarks/parity.py`."""
    if torch.cuda.get_device_properties(0).total_memory < NEEDED_BYTES:
        pytest.skip("the model in bfloat16 and in float32 does not fit this device")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repo_root / "benchmarks"))
        parity = importlib.import_module("parity")
        reference = os.environ.get("TEMPOVLM_REFERENCE")
        found = parity.measure(MOLMOE_1B, torch.device("cuda"), torch.bfloat16, reference=reference)
        folder = tmp_path_factory.mktemp("parity")
        parity.write(found, Path(os.environ.get("TEMPOVLM_PARITY_JSON") or folder / "parity.json"))
        yield found
    torch.cuda.empty_cache()


def test_what_was_compared_is_what_is_served(record: dict[str, Any]) -> None:
    assert [row["tokens"] for row in record["rows"]] == [40, 336, 773, 1250]
    assert all(row["by_graphs"] for row in record["rows"])
    assert record["positions"] == 33 * len(record["rows"])


def test_logits_are_within_two_percent_of_float32(record: dict[str, Any]) -> None:
    """By norm over all logits; and each position's largest error where both took the same experts."""
    assert record["relative_norm_error"] <= LIMIT
    assert record["same_experts"]["max_relative_logit_error"] <= LIMIT


def test_greedy_tokens_are_equal_wherever_the_margin_exceeds_the_error(record: dict[str, Any]) -> None:
    assert record["clear"] >= record["positions"] // 4
    assert record["clear_and_equal"] == record["clear"]


def test_no_further_from_float32_than_the_published_bfloat16(record: dict[str, Any]) -> None:
    """In float32 both are the same model, but for an expert that is swapped at equal router weights."""
    if "published_float32" not in record:
        pytest.skip(f"published implementation {record['published']}")
    same = record["published_float32"]["exact_against_it"]
    assert same["median_relative_logit_error"] <= 1e-4
    assert same["relative_norm_error"] <= 1e-3
    assert same["clear_and_equal"] == same["clear"]
    ours = record["published_float32"]["fast_against_it"]
    theirs = record["published_autocast"]["it_against_exact"]
    assert ours["relative_norm_error"] <= max(1.2 * theirs["relative_norm_error"], LIMIT / 2)
    assert ours["clear_and_equal"] == ours["clear"]
