"""Policies that learn nothing: a fixed setting, and a table of measured accuracies.

Tables that `tempovlm tune` measured on your own questions are kept in the cache directory, for each model's
weights, by the name of the questions' file and the digest of its bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tempovlm.control.policy import Policy, Question
from tempovlm.control.select import TIE, Floats
from tempovlm.core.checks import PATH_SHOWN, finite, shown, wrong_argument
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobConfig, KnobSpace
from tempovlm.core.paths import cache_dir, exists_as, expanded, is_there, read_json, write_whole
from tempovlm.core.plan import Ranking

FIXED = "fixed"
"""Name of the policy that always runs one setting."""

ASSUMED = "table (assumed)"
"""The name of the table of a model whose accuracies nobody has measured."""

TUNED = "table:"
"""Begins the name of a table that was measured on your own questions, such as `table:my`."""

TUNED_SCHEMA = "tempovlm.tuned/1"

_AGAIN = "measure them anew: tempovlm tune FILE --force"


@dataclass(frozen=True)
class FixedPolicy(Policy):
    """Always chooses one setting."""

    knobs: KnobConfig
    space: KnobSpace
    name: str = FIXED

    def look(self, question: Question, left_ms: float) -> Floats:  # noqa: ARG002 - the protocol's
        """Return 1 for the setting and 0 for all others: (K,)."""
        return np.eye(len(self.space))[self.space.index(self.knobs)]


@dataclass(frozen=True)
class TablePolicy(Policy):
    """Scores each setting by its mean accuracy, measured in advance.

    It sees neither the question nor the picture. Accuracies are those of the model card, those that `tempovlm
    tune` measured, or `prior_accuracy` where there are none.
    """

    space: KnobSpace
    accuracy: Mapping[KnobConfig, float]
    name: str = "table"
    scale = "accuracy"
    tie = TIE

    @property
    def usual(self) -> Floats:
        """(K,) the accuracies, which are means."""
        return self._scores

    def look(self, question: Question, left_ms: float) -> Floats:  # noqa: ARG002 - the protocol's
        """Return the accuracies (K,)."""
        return self._scores

    @cached_property
    def _scores(self) -> Floats:
        return np.array([self.accuracy[knobs] for knobs in self.space])


def prior_accuracy(space: KnobSpace) -> dict[KnobConfig, float]:
    """Return assumed accuracies for a model without measured ones: more compute is better.

    The tier weighs most, because depth cannot make up for details that the model never sees. These are not
    measured values.
    """
    accuracy = {}
    for knobs in space:
        accuracy[knobs] = 0.5 * (space.tiers.index(knobs.tier) + 1) / len(space.tiers)
        accuracy[knobs] += 0.3 * knobs.num_blocks / space.block_counts[-1]
        accuracy[knobs] += 0.2 * min(knobs.top_k / space.native_top_k, 1.0)
    return accuracy


def assumed_table(space: KnobSpace) -> TablePolicy:
    """The table of a model whose accuracies nobody has measured."""
    return TablePolicy(space, prior_accuracy(space), ASSUMED)


@dataclass(frozen=True)
class TunedTable:
    """Accuracies of all settings on your own questions.

    Attributes:
        path: of the file. record: what it holds: for each setting its accuracy, interval and number of questions.
    """

    path: Path
    record: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of the questions."""
        return str(self.record["name"])

    @property
    def digest(self) -> str:
        """Of the questions' file."""
        return str(self.record["digest"])

    @property
    def accuracy(self) -> dict[KnobConfig, float]:
        """The expected accuracy of each setting."""
        return {_knobs(row): row["accuracy"] for row in self.record["settings"]}

    def policy(self, space: KnobSpace) -> TablePolicy:
        """The policy that goes by them."""
        return TablePolicy(space, self.accuracy, f"{TUNED}{self.name}")


def is_tuned(policy: object) -> bool:
    """Whether a policy's name is that of a table of your own questions."""
    return isinstance(policy, str) and policy.startswith(TUNED)


def tuned_path(weights: str, name: str, digest: str) -> Path:
    """The file of the accuracies of a model's settings on a file of questions."""
    return cache_dir() / "tuned" / weights / f"{name}-{digest}.json"


def save_tuned(record: Mapping[str, Any]) -> TunedTable:
    """Store accuracies of all settings.

    Raises:
        UserError: the cache directory cannot be written to.
    """
    path = tuned_path(record["weights"], record["name"], record["digest"])
    whole = {"schema": TUNED_SCHEMA, **record}
    write_whole(path, json.dumps(whole, indent=2) + "\n")
    return TunedTable(path, whole)


def find_tuned(
    weights: str, space: KnobSpace, name: str, digest: str, ranking: Ranking | None = None
) -> TunedTable | None:
    """The accuracies on a file of questions as it is; None where none were measured.

    Raises:
        UserError: the file is damaged.
    """
    path = tuned_path(weights, name, digest)
    return read_tuned(path, weights, space, ranking) if is_there(path) else None


def named_tuned(wanted: str, weights: str, space: KnobSpace, ranking: Ranking | None = None) -> TunedTable:
    """The accuracies that a policy `table:NAME` names.

    Args:
        wanted: what stands behind `table:`: the questions' name, of which the newest accuracies count; their file,
            which must be as it was; or a file of accuracies.
        weights: hash of the model's weights.
        space: the settings to choose among.
        ranking: by which the model's blocks run; None takes accuracies of any.

    Raises:
        UserError: there are none, or they are damaged, of another model, or of another ranking.
    """
    path = expanded(wanted)
    if path.suffix == ".json":
        return read_tuned(path, weights, space, ranking)
    folder = tuned_path(weights, "", "").parent
    known = sorted(folder.glob("*.json"), key=lambda one: one.stat().st_mtime) if folder.is_dir() else []
    names = {one: one.stem.rpartition("-") for one in known}
    pattern = name = wanted
    if path.suffix and exists_as(path, Path.is_file):
        from tempovlm.data.own import digest_of, own_name

        name = own_name(path)
        pattern = f"{name}-{digest_of(path)}"
    fitting = [one for one in known if pattern in (one.stem, names[one][0])]
    if fitting:
        return read_tuned(fitting[-1], weights, space, ranking)
    changed = any(names[one][0] == name for one in known)
    why = "the file has changed since it was tuned" if changed else "this model was not tuned on such questions"
    others = ", ".join(dict.fromkeys(parts[0] for parts in names.values()))
    raise wrong_argument(
        "policy",
        f"{TUNED}{wanted}",
        f"{why}; run tempovlm tune {path if path.suffix else f'{wanted}.csv'}"
        + (f", or choose from {others}" if others and not changed else ""),
        PATH_SHOWN,
    )


def read_tuned(path: Path, weights: str, space: KnobSpace, ranking: Ranking | None = None) -> TunedTable:
    """Read and check a file of accuracies; those of more settings serve a part of them.

    Raises:
        UserError: it is missing, damaged or of another model; names the field.
    """
    record = read_json(path, _AGAIN)
    try:
        for name, ours in {"schema": TUNED_SCHEMA, "weights": weights}.items():
            if record[name] != ours:
                was = shown(repr(record[name]))
                raise UserError(f"{path}: field {name} is {was}, where {ours!r} is due; {_AGAIN}")
        if ranking is not None and tuple(record["ranking"]) != ranking.order:
            raise UserError(f"{path}: field ranking is another one: its accuracies do not hold for these blocks")
        table = TunedTable(path, record)
        values = {**table.accuracy}
        _ = table.name, table.digest
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error!r}); {_AGAIN}") from None
    for knobs in space:
        if (value := finite(values.get(knobs))) is None or not 0 <= value <= 1:
            was = shown(repr(values.get(knobs)))
            raise UserError(f"{path}: field accuracy of {knobs} is {was}, not a number from 0 to 1; {_AGAIN}")
    return table


def _knobs(row: Mapping[str, Any]) -> KnobConfig:
    return KnobConfig.from_mapping(row)
