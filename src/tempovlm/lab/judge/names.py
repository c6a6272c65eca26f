"""Names of policies as people say them, for headlines, legends and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tempovlm.control.checkpoint import Origin

TWIN_PICK = "twin pick"
HINDSIGHT = "hindsight oracle"

_BASELINES = {
    "table": "table",
    "fixed": "native setting",
    "best_static": "best fixed setting",
    "only_tier": "tier only",
    "only_top_k": "top-k only",
    "only_num_blocks": "depth only",
    "random": "random setting",
    "knn": "k nearest neighbours",
    "linucb": "LinUCB",
    "oracle": HINDSIGHT,
}
_KINDS = {
    "supervised": "supervised",
    "two_stage_stage1": "first stage",
    "two_stage": "two-stage",
    "llm_based": "LLM-based",
    "seen_value": "expected accuracies",
    "nearest_neighbours": "k nearest neighbours",
    "linucb": "LinUCB",
}
_END_TO_END = ("two_stage", "grpo")
"""Kind of a checkpoint and how it was trained: both stages at once (Exp 5), with the networks of Exp 4."""

_LONGEST = 40


def names(policies: Sequence[str], origins: Mapping[str, Origin]) -> dict[str, str]:
    """Name policies as people do, each differently.

    Where several have the same name, the seed distinguishes them, else the folders or files that differ.

    Args:
        policies: the words of `--policies`: baselines, `table:NAME`, paths of checkpoints, `module:Class`.
        origins: what each checkpoint says of itself, by path.

    Returns:
        A name for each policy, in their order.
    """
    found = {policy: _name(policy, origins.get(policy)) for policy in policies}
    for name, count in Counter(found.values()).items():
        same = [policy for policy in policies if found[policy] == name and policy not in _BASELINES]
        if count < 2:
            continue
        seeds = [origins[policy].options.get("seed") if policy in origins else None for policy in same]
        is_told = len(same) == count and None not in seeds and len(set(seeds)) == count
        marks = [f"seed {seed}" for seed in seeds] if is_told else _places(same)
        found |= {policy: f"{name} ({mark})" for policy, mark in zip(same, marks, strict=True)}
    return found


def _name(policy: str, origin: Origin | None) -> str:
    """The name of one policy, whatever the others are called."""
    if origin is not None:
        if (origin.kind, origin.options.get("policy")) == _END_TO_END:
            return "end to end"
        return _KINDS.get(origin.kind, origin.kind)
    if policy.startswith("table:"):
        return f"table tuned on {Path(policy.removeprefix('table:')).stem}"
    return _BASELINES.get(policy, policy.rpartition(":")[2])


def _places(paths: Sequence[str]) -> list[str]:
    """Shorten paths to the parts that not all share, cut at the start where too long."""
    split = [Path(path).parts for path in paths]
    if len(split) > 1:
        shared = set.intersection(*map(set, split))
        split = [tuple(part for part in parts if part not in shared) or parts for parts in split]
    texts = ["/".join(parts) for parts in split]
    return [text if len(text) <= _LONGEST else "…" + text[1 - _LONGEST :] for text in texts]
