"""Policies of one's own: scores, attributes and code that are wrong are told on one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tempovlm.control.own_policy import checked_policy, own_policy
from tempovlm.control.policy import Policy
from tempovlm.core.errors import PolicyError, UserError
from tiny_model import SPACE

QUESTION: Any = None


class Scored(Policy):
    """Returns what it is given, or raises it."""

    name = "scored"

    def __init__(self, scores: Any) -> None:
        self._scores = scores

    def look(self, question: Any, left_ms: float) -> Any:  # noqa: ARG002
        if isinstance(self._scores, Exception):
            raise self._scores
        return self._scores


@pytest.mark.parametrize(
    "scores", [[1] * len(SPACE), torch.ones(len(SPACE)), np.ones(len(SPACE), bool), np.full(len(SPACE), np.inf)]
)
def test_scores_are_taken_from_lists_tensors_and_arrays(scores: Any) -> None:
    taken = checked_policy(Scored(scores), SPACE).look(QUESTION, 100.0)
    assert taken.shape == (len(SPACE),)
    assert taken.dtype == float


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        (torch.ones(len(SPACE), requires_grad=True), "scored a Tensor"),
        (np.ones(len(SPACE), dtype=complex), "scored a ndarray"),
        (["a"] * len(SPACE), "scored a list"),
        (np.ones((1, len(SPACE))), "scored an array of shape"),
        (np.full(len(SPACE), np.nan), "scored NaN for"),
        (None, "scored a NoneType"),
        (RuntimeError("boom\nsecond line"), r"look failed \(RuntimeError: boom second line\)"),
    ],
)
def test_wrong_scores_and_errors_are_told_on_one_line(scores: Any, told: str) -> None:
    policy = checked_policy(Scored(scores), SPACE)
    with pytest.raises(PolicyError, match=f"^policy Scored: {told}") as caught:
        policy.look(QUESTION, 100.0)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("attribute", "value"), [("tie", "x"), ("tie", -1.0), ("scale", "percent"), ("name", 3)])
def test_wrong_attributes_are_told(attribute: str, value: Any) -> None:
    cls = type("Own", (Scored,), {attribute: value})
    with pytest.raises(UserError, match=f"policy Own: .*attribute {attribute}"):
        checked_policy(cls([0]), SPACE)


@pytest.mark.parametrize(
    "code",
    [
        "import sys\nsys.exit(0)\n",
        "from tempovlm.control.policy import Policy\nclass Own(Policy):\n"
        "    name = 'own'\n    def look(self, question, left_ms): ...\n"
        "    def __init__(self): raise SystemExit\n",
    ],
)
def test_a_file_that_ends_the_process_is_told(code: str, tmp_path: Path) -> None:
    path = tmp_path / "leaves.py"
    path.write_text(code, encoding="utf-8")
    with pytest.raises(UserError, match="SystemExit"):
        own_policy(f"{path}:Own", SPACE)
