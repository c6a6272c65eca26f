"""Says how long answers may get, by prompt style: by the model's card, by answers seen, else up to the cap."""

from __future__ import annotations

from collections.abc import Mapping

from tempovlm.core.request import Answer, Request
from tempovlm.latency.profile import OutputLength

SEEN = 64
"""Answers of one style and cap from which on their lengths are taken for those to come; looked at again whenever
there are twice as many."""

_BITS = 5
"""Leading bits that larger caps are rounded up to. Each distribution that clients can ask for needs tables of its
own, which take as long as a short answer."""


class Lengths:
    """The distribution of answers' lengths that a request is planned with.

    Attributes:
        card: of the styles that the model was measured with.
    """

    def __init__(self, card: Mapping[str, OutputLength]) -> None:
        self.card = dict(card)
        self._counts: dict[tuple[str, int], list[int]] = {}
        self._learned: dict[tuple[str, int], OutputLength] = {}

    def of(self, request: Request) -> OutputLength:
        """Return the lengths of a request's answer, none above its cap; any length where nothing is known.

        A cap above 32 counts as the next of those that are told apart, at most a sixteenth above it.
        """
        cap = _told_apart(request.max_new_tokens)
        learned = self._learned.get((request.style, cap))
        if learned is not None:
            return learned
        known = self.card.get(request.style)
        return OutputLength((1,) * cap) if known is None else known.capped(cap)

    def observe(self, request: Request, answer: Answer) -> None:
        """Count an answer that ended by itself or at its cap."""
        if answer.finish_reason not in ("stop", "length"):
            return
        cap = _told_apart(request.max_new_tokens)
        key = (request.style, cap)
        counts = self._counts.setdefault(key, [0] * cap)
        counts[answer.num_output_tokens - 1] += 1
        total = sum(counts)
        if total >= SEEN and total & (total - 1) == 0:
            self._learned[key] = OutputLength(tuple(counts))


def _told_apart(cap: int) -> int:
    """Return the least cap that is told apart from others and is not smaller: 16 of them from 2^n to 2^(n + 1)."""
    step = 1 << max(0, (cap - 1).bit_length() - _BITS)
    return -(-cap // step) * step
