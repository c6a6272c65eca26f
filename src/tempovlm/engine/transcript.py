"""The tokens of one answer as they come, their text, and the reason why they end."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from tempovlm.core.errors import UserError
from tempovlm.core.request import FinishReason, Request
from tempovlm.model.decoder import BROKEN
from tempovlm.model.prompt import Tokenizer

UNFINISHED = "\ufffd"
"""Placeholder that a byte tokenizer emits for the first bytes of a character that is not complete."""


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token with text: its id, the text it adds, its place in the answer.

    The joined texts of an answer's tokens are the answer's text. So a token whose text later tokens may
    change or remove (half a character, the beginning of a stop text, outer white space) is held back until
    they cannot, and adds no text if they did.
    """

    id: int
    text: str
    index: int


class Transcript:
    """Collects tokens; `finish` is the reason why the answer ended, None before.

    Attributes:
        tokens: all generated tokens, including the end token.
        text: their text, without outer white space, up to the first stop text.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self._request, self._tokenizer = request, tokenizer
        self.tokens: list[int] = []
        self.text = ""
        self.finish: FinishReason | None = None
        self._sure = 0
        self._shown = 0
        self._held: deque[tuple[int, int, int]] = deque()  # id, place, and the length of the text with it

    def add(self, token: int) -> list[Token]:
        """Add one more token; return the tokens whose text is now final, oldest first.

        The end token counts as generated, because it takes a step like any other, but is never returned.

        Raises:
            UserError: the token marks logits that are not numbers.
        """
        if token == BROKEN:
            raise UserError(
                f"the model's logits are not numbers (NaN or infinite) at token {len(self.tokens) + 1} of the "
                "answer: its weights are damaged or overflow; copy them again, or load them in float32"
            )
        self.tokens.append(token)
        if token == self._tokenizer.end:
            self.end("stop")
            return self.settled()
        # The answer begins at its first character; white space before it is neither shown nor searched.
        said = self._tokenizer.decode(self.tokens).lstrip()
        whole = said.rstrip(UNFINISHED)
        cut = min((at for at in map(whole.find, self._request.stop) if at >= 0), default=-1)
        if cut >= 0:
            said, self.finish = whole[:cut], "stop"
        elif len(self.tokens) >= self._request.max_new_tokens:
            self.finish = "length"
        self.text = said.rstrip()
        self._sure = len(whole[: _begun(whole, self._request.stop)].rstrip())
        self._held = deque((one, index, min(end, len(said))) for one, index, end in self._held)
        self._held.append((token, len(self.tokens) - 1, len(said)))
        return self.settled()

    def end(self, reason: FinishReason) -> None:
        """End the answer early; `settled` returns the tokens that were held back."""
        self.finish = reason

    def settled(self) -> list[Token]:
        """Return the held-back tokens whose text is final: all of them once the answer is over."""
        tokens, sure = [], len(self.text) if self.finish else self._sure
        while self._held and (self.finish or self._held[0][2] <= sure):
            token, index, end = self._held.popleft()
            end = max(self._shown, min(end, sure) if self._held else sure)
            tokens.append(Token(token, self.text[self._shown : end], index))
            self._shown = end
        return tokens


def _begun(text: str, stops: Sequence[str]) -> int:
    """Return where the longest suffix of the text begins that starts a stop text; the text's length if none."""
    return min(
        (
            len(text) - length
            for stop in stops
            for length in range(min(len(stop) - 1, len(text)), 0, -1)
            if text.endswith(stop[:length])
        ),
        default=len(text),
    )
