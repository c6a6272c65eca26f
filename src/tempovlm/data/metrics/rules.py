"""Rules of scoring that a file of your own questions may name, and the one that its answers suggest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from tempovlm.data.dataset import Metric
from tempovlm.data.metrics.text import anls, exact_match, relaxed_accuracy, vqa_accuracy

METRICS: Mapping[str, Metric] = {
    "exact": exact_match,
    "vqa": vqa_accuracy,
    "anls": anls,
    "relaxed": relaxed_accuracy,
}
Rule = Literal["exact", "vqa", "anls", "relaxed", "choice"]
RULES: tuple[Rule, ...] = get_args(Rule)
"""Those of `METRICS` score open answers; `choice` scores by the option that a reply means."""

LEAST_FOR_VQA = 4
"""References without which VQA accuracy gives less than 1 to any reply: one is left out, three must match."""

_USUAL_FOR_VQA = 10

DESCRIPTIONS: Mapping[str, str] = {
    "exact": "exact match after VQA normalisation",
    "vqa": "VQA accuracy",
    "anls": "ANLS",
    "relaxed": "relaxed accuracy (numbers within 5 %)",
    "choice": "the option that the reply means",
}


def choose_rule(wanted: str | None, num_references: int) -> str:
    """The rule that an open question is scored by.

    Args:
        wanted: a rule of `METRICS`, or None for VQA accuracy where ten people answered and exact match elsewhere.
        num_references: how many right answers it has; below `LEAST_FOR_VQA`, VQA accuracy becomes exact match.
    """
    if wanted == "vqa" and num_references < LEAST_FOR_VQA:
        return "exact"
    return wanted or ("vqa" if num_references >= _USUAL_FOR_VQA else "exact")
