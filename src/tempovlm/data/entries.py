"""Read the fields of a question from JSON or Parquet; faults raise an error of one line."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from tempovlm.core.checks import shown
from tempovlm.core.errors import UserError

_WHOLE = re.compile(r"\s*(\d{1,12})(?:\.0*)?\s*")
_LETTERS = 26


@dataclass(frozen=True, slots=True)
class Entry:
    """The fields of a question, an annotation or a picture.

    Attributes:
        fields: Values by field name.
        path: The file that it comes from.
        name: Its name in messages, such as `question 34602`.
    """

    fields: Mapping[str, Any]
    path: Path
    name: str

    @classmethod
    def each(cls, values: Any, path: Path, key: str, word: str = "question") -> Iterator[Entry]:
        """Return the entries of a list in a file, named by their id.

        Args:
            values: The list.
            path: The file.
            key: Name of the field that holds an entry's id.
            word: Word for an entry, in messages.

        Raises:
            UserError: It is not a list, or contains something that is not an object or has no id.
        """
        if not isinstance(values, list):
            raise UserError(f"{path}: holds {_shown(values)} where a list of {word}s belongs; get the file again")
        for place, fields in enumerate(values):
            if not isinstance(fields, Mapping):
                raise UserError(f"{path}: entry {place} is {_shown(fields)}, no object; get the file again")
            name = cls(fields, path, f"entry {place}").text(key)
            yield cls(fields, path, f"{word} {name}")

    def wrong(self, key: str, why: str) -> UserError:
        """Return the error that a field is wrong: file, entry, field, reason and remedy on one line."""
        return UserError(f"{self.path}: {self.name}: {key} {why}; correct it, or get the file again")

    def value(self, key: str) -> Any:
        """Return a field unchanged.

        Raises:
            UserError: It is missing.
        """
        if key not in self.fields:
            raise self.wrong(key, "is missing")
        return self.fields[key]

    def text(self, key: str) -> str:
        """Return a text, or a number as text.

        Raises:
            UserError: It is missing or neither.
        """
        return self._as_text(key, self.value(key))

    def whole(self, key: str) -> int:
        """Return a whole number from 0 up: 4, 4.0, "4" or "4.0".

        Raises:
            UserError: It is missing or not such a number.
        """
        return self._as_whole(key, self.value(key))

    def answers(self, key: str = "answers") -> tuple[str, ...]:
        """Return people's answers: a list of texts, numbers or objects with `answer`, or a single one of them.

        If an object also has a `raw_answer`, that is used: the person's text before it was normalised.

        Raises:
            UserError: It is missing or empty, or an answer is none of these.
        """
        return tuple(self._as_text(place, value) for place, value in self._several(key))

    def counts(self, key: str) -> tuple[str, ...]:
        """Return answers as `answers` does, as whole numbers in digits.

        Raises:
            UserError: It is missing or empty, or an answer is not a whole number.
        """
        return tuple(str(self._as_whole(place, value)) for place, value in self._several(key))

    def options(self, key: str) -> tuple[str, ...]:
        """Return the options of a multiple choice question: a list of texts or numbers.

        Raises:
            UserError: It is missing, not a list or empty, an option is neither, or there are more than letters.
        """
        value = self.value(key)
        if not isinstance(value, list):
            raise self.wrong(key, f"is {_shown(value)}, no list of options")
        if not 1 <= len(value) <= _LETTERS:
            raise self.wrong(key, f"holds {len(value)} options; 1 to {_LETTERS} have a letter each")
        return tuple(self._as_text(f"{key}[{place}]", one) for place, one in enumerate(value))

    def option_index(self, key: str, count: int) -> int:
        """Return the index of the right option among `count`, from 0.

        Raises:
            UserError: It is missing, or not a whole number below `count`.
        """
        index = self.whole(key)
        if index >= count:
            raise self.wrong(key, f"is {index}, and the last of {count} options is {count - 1}")
        return index

    def asked(self, question_id: str = "question_id", image_id: str = "image_id") -> dict[str, Any]:
        """Return the fields of an open question's sample: ids from these fields, `question` and `answers`.

        Raises:
            UserError: One is missing or wrong.
        """
        return {
            "question_id": self.text(question_id),
            "image_id": self.text(image_id),
            "question": self.text("question"),
            "answers": self.answers(),
        }

    def made(self) -> dict[str, Any]:
        """Return the fields of a sample that generated data adds; defaults for official files."""
        return {"template": self.fields.get("template", ""), "held_out": self.fields.get("held_out", False)}

    def _several(self, key: str) -> Iterator[tuple[str, Any]]:
        """Return each answer with its position, for messages."""
        value = self.value(key)
        if isinstance(value, list) and not value:
            raise self.wrong(key, "is empty, so that no reply could be right")
        for place, one in enumerate(value) if isinstance(value, list) else [(None, value)]:
            where = key if place is None else f"{key}[{place}]"
            if isinstance(one, Mapping):
                raw = one.get("raw_answer")
                yield f"{where}.answer", one.get("answer") if raw is None else raw
            else:
                yield where, one

    def _as_text(self, key: str, value: Any) -> str:
        text = _text(value)
        if text is None:
            raise self.wrong(key, f"is {_shown(value)}, neither text nor number")
        return text

    def _as_whole(self, key: str, value: Any) -> int:
        found = _WHOLE.fullmatch(_text(value) or "")
        if found is None:
            raise self.wrong(key, f"is {_shown(value)}, no whole number from 0 up")
        return int(found[1])


def _text(value: Any) -> str | None:
    """Return a text unchanged, a number in digits (4.0 as 4: columns with gaps store whole numbers so); else None.

    `true` is not text: `yes` and `true`, and with some writers 1, are all stored as `true`.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        return None
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        return None
    return str(int(value)) if value == int(value) else str(value)


def _shown(value: Any) -> str:
    """Return a value for a message: short, in JSON's words."""
    is_word = value is None or isinstance(value, bool)
    return shown({None: "null", True: "true", False: "false"}[value] if is_word else repr(value))
