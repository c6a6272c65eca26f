"""The last minutes of a server, for its page: counts by slots of time, and the latest answers with a budget."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from tempovlm.core.request import Answer

SLOT_MS = 5_000.0
NUM_SLOTS = 60
_MINUTE_MS = 60_000.0
MOST_ANSWERS = 300
"""Answers with a budget that are kept; older ones are in the counts alone."""

ENDS = ("met", "no_budget", "missed", "cut", "refused")
REFUSALS = frozenset(("budget_infeasible", "queue_full", "draining", "calibrating"))
"""Codes of requests that were in order and were refused all the same."""


@dataclass(slots=True)
class Slot:
    """Some seconds: requests by their end, answers by their setting, the most that waited, and the last price.

    Attributes:
        infeasible: refusals that no faster or idler server would have spared.
    """

    number: int
    ends: Counter[str] = field(default_factory=Counter)
    settings: Counter[str] = field(default_factory=Counter)
    infeasible: int = 0
    waiting: int = 0
    price_per_ms: float | None = None


class Recent:
    """Keeps `NUM_SLOTS` slots of `SLOT_MS`. It has no clock: times are passed in, and never go back."""

    def __init__(self) -> None:
        self._slots: deque[Slot] = deque(maxlen=NUM_SLOTS)
        self._answers: deque[tuple[float, float, float, str]] = deque(maxlen=MOST_ANSWERS)

    def _slot(self, time_ms: float) -> Slot:
        number = int(time_ms // SLOT_MS)
        if not self._slots or self._slots[-1].number != number:
            self._slots.append(Slot(number))
        return self._slots[-1]

    def answered(self, answer: Answer, deadline: str | None, price_per_ms: float, time_ms: float) -> None:
        """Count an answer; `deadline` is met, missed, cut, or None where it had no budget."""
        slot = self._slot(time_ms)
        slot.ends[deadline or "no_budget"] += 1
        slot.settings[str(answer.knobs)] += 1
        slot.price_per_ms = price_per_ms
        if answer.budget_ms is not None and deadline is not None:
            self._answers.append((time_ms, answer.budget_ms, answer.timings_ms["total"], deadline))

    def refused(self, code: str, time_ms: float) -> None:
        """Count a refusal; errors of the client are none."""
        if code in REFUSALS:
            slot = self._slot(time_ms)
            slot.ends["refused"] += 1
            slot.infeasible += code == "budget_infeasible"

    def waits(self, count: int, time_ms: float) -> None:
        """Tell how many wait."""
        slot = self._slot(time_ms)
        slot.waiting = max(slot.waiting, count)

    def failed_share(self, time_ms: float) -> float:
        """Return the share of the last minute's requests that were refused for want of time, late or cut."""
        ends, first = Counter[str](), (time_ms - _MINUTE_MS) // SLOT_MS
        for slot in self._slots:
            if slot.number > first:
                ends.update(slot.ends)
                ends["refused"] -= slot.infeasible
        count = ends.total()
        return (ends["refused"] + ends["missed"] + ends["cut"]) / count if count else 0.0

    def told(self, time_ms: float) -> dict[str, Any]:
        """Return the last minutes as plain values, one column each; slots from the oldest to that of now."""
        last = int(time_ms // SLOT_MS)
        kept = {slot.number: slot for slot in self._slots}
        slots = [kept.get(number, Slot(number)) for number in range(last - NUM_SLOTS + 1, last + 1)]
        answers = [one[1:] for one in self._answers if one[0] // SLOT_MS > last - NUM_SLOTS]
        budgets_ms, totals_ms, deadlines = zip(*answers, strict=True) if answers else ((), (), ())
        settings = Counter[str]()
        for slot in slots:
            settings.update(slot.settings)
        return {
            "slot_ms": SLOT_MS,
            "requests": {end: [slot.ends[end] for slot in slots] for end in ENDS},
            "waiting": [slot.waiting for slot in slots],
            "price_per_ms": [slot.price_per_ms for slot in slots],
            "settings": dict(settings.most_common()),
            "answers": {
                "budget_ms": budgets_ms,
                "total_ms": [round(total_ms, 1) for total_ms in totals_ms],
                "deadline": deadlines,
            },
        }
