"""The model card: measured accuracies and answer lengths, from the `accuracy.json` beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tempovlm.core.checks import finite, integer, shown
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobConfig, KnobSpace
from tempovlm.core.paths import is_there, read_json
from tempovlm.core.plan import Ranking, checked_ranking

_AGAIN = "copy it again from the model's folder"


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Accuracies and lengths; a field is None if it was not measured.

    Attributes:
        accuracy: share of right answers, from 0 to 1, of each setting.
        ranking: blocks by importance.
        length_counts: how many answers have 1, 2, … generated tokens, the end token included.
        option_letters: letters that the model names options by; empty if it was not taught to.
    """

    accuracy: dict[KnobConfig, float] | None = None
    ranking: Ranking | None = None
    length_counts: tuple[int, ...] | None = None
    length_by_style: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    option_letters: str = ""

    def for_ranking(self, ranking: Ranking, space: KnobSpace) -> ModelCard:
        """The card of a model that runs by a ranking; without accuracies if those are of other blocks."""
        return self if self.ran(ranking, space) else replace(self, accuracy=None)

    def ran(self, ranking: Ranking, space: KnobSpace) -> bool:
        """Whether the same blocks run by a ranking, at each depth of a space, as by the model's own."""
        own = self.ranking or Ranking.evenly_spaced(len(ranking.order))
        return all(ranking.blocks(depth) == own.blocks(depth) for depth in space.block_counts)

    @classmethod
    def read(cls, folder: Path, space: KnobSpace) -> ModelCard:
        """Return the card of a model folder; an empty one without `accuracy.json`.

        Raises:
            UserError: the file cannot be read or is damaged, lacks a setting of the knob space, or a value
                is wrong; names the field.
        """
        path = folder / "accuracy.json"
        if not is_there(path):
            return cls()
        record = read_json(path, _AGAIN)
        try:
            accuracy = {KnobConfig.from_mapping(row): row["accuracy"] for row in record["settings"]}
            order, output = record.get("ranking"), record.get("output_tokens")
            counts = None if output is None else output.get("counts")
            by_style = dict({} if output is None else output.get("by_style", {}))
            letters = record.get("option_letters", "")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: damaged ({error}); {_AGAIN}") from None
        missing = [knobs for knobs in space if knobs not in accuracy]
        if missing:
            raise UserError(f"{path}: {len(missing)} settings have no accuracy, {missing[0]} among them")
        for knobs in space:
            if (value := finite(accuracy[knobs])) is None or not 0 <= value <= 1:
                raise UserError(
                    f"{path}: field accuracy of {knobs} is {shown(repr(accuracy[knobs]))}, not a number from 0 to "
                    f"1; {_AGAIN}"
                )
        if not isinstance(letters, str):
            raise UserError(f"{path}: field option_letters is {shown(repr(letters))}, no text; {_AGAIN}")
        styles = {str(name): found for name, one in by_style.items() if (found := _lengths(one, path))}
        if order is not None and not isinstance(order, list):
            raise UserError(f"{path}: field ranking is {shown(repr(order))}, no list of blocks; {_AGAIN}")
        ranking = checked_ranking(order, space.block_counts[-1], f"{path}: field ranking") if order else None
        return cls(accuracy, ranking, _lengths(counts, path), styles, letters)


def _lengths(counts: Any, path: Path) -> tuple[int, ...] | None:
    if counts is None or counts == []:
        return None
    is_list = isinstance(counts, list) and all(integer(count) is not None and count >= 0 for count in counts)
    if not is_list or not any(counts):
        raise UserError(
            f"{path}: field output_tokens: counts is {shown(repr(counts))}, not a list of whole numbers from 0 "
            f"on, one of them above; {_AGAIN}"
        )
    return tuple(counts)
