"""What was measured about a model's answers, from the `accuracy.json` beside its weights. Runs no model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobConfig, KnobSpace
from tempovlm.core.plan import Ranking


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Accuracies and lengths; a field is None where it was not measured.

    Attributes:
        accuracy: share of right answers, from 0 to 1, of each setting.
        ranking: blocks by importance.
        length_counts: how many answers have 1, 2, … generated tokens, the end token included.
        option_letters: by which the model names the options of a question; empty where it was not taught to.
    """

    accuracy: dict[KnobConfig, float] | None = None
    ranking: Ranking | None = None
    length_counts: tuple[int, ...] | None = None
    option_letters: str = ""

    @classmethod
    def read(cls, folder: Path, space: KnobSpace) -> ModelCard:
        """The card of a model folder; an empty one where there is no `accuracy.json`.

        Raises:
            UserError: the file is damaged, or lacks a setting of the knob space.
        """
        path = folder / "accuracy.json"
        if not path.is_file():
            return cls()
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            accuracy = {
                KnobConfig(tier=row["tier"], top_k=row["top_k"], num_blocks=row["num_blocks"]): row["accuracy"]
                for row in record["settings"]
            }
            order = record.get("ranking")
            ranking = Ranking(tuple(order)) if order else None
            counts = (record.get("output_tokens") or {}).get("counts")
            lengths = tuple(int(count) for count in counts) if counts else None
            letters = record.get("option_letters", "")
            if not isinstance(letters, str):
                raise TypeError(f"field option_letters: {letters!r} is no text")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: damaged ({error}); copy it again from the model's folder") from None
        missing = [knobs for knobs in space if knobs not in accuracy]
        if missing:
            raise UserError(f"{path}: {len(missing)} settings have no accuracy, {missing[0]} among them")
        return cls(accuracy, ranking, lengths, letters)
