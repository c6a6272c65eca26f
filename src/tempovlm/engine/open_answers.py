"""Limits for a model that was taught to name options by letter, on questions that list no options.

A lone letter does not answer an open question, and neither does an empty answer. So an open
answer begins with a word, and goes on after a letter that stands alone: letters also begin words that are spelled.
Limits are numbers added to logits, 0 or minus infinity. Nothing here waits for a device.

Shapes: `B` rows, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tempovlm.core.errors import UserError
from tempovlm.core.request import Request
from tempovlm.data.sample import lists_options
from tempovlm.model.prompt import Tokenizer


@dataclass(frozen=True, eq=False, slots=True)
class OpenAnswers:
    """Limits of one model's open answers, on its device.

    Attributes:
        first: (3, V) for the first token: of any answer, of an open one, of an open one limited to one token,
            which has a letter or a digit but is no lone letter.
        second: (2, V) for the token after it: after any token, after a letter.
        is_letter: (V,) 1 for the tokens that are letters, else 0.
        is_open: (2,) 0 and 1, to select rows of a batch without a copy to the device.
    """

    first: Tensor
    second: Tensor
    is_letter: Tensor
    is_open: Tensor

    @classmethod
    def of(cls, tokenizer: Tokenizer, letters: str, like: Tensor) -> OpenAnswers | None:
        """Return the limits of a model with the embedding `like` (V, D) that names options by `letters`, or None.

        Raises:
            UserError: no letter is a token.
        """
        if not letters:
            return None
        spelled = [tokenizer.encode(letter) for letter in letters]
        alone = [tokens[0] for tokens in spelled if len(tokens) == 1 and tokens[0] != tokenizer.unknown]
        if not alone:
            raise UserError(f"accuracy.json: field option_letters: no token is one of {letters}; leave it out")
        V, begin = like.shape[0], alone[0]
        texts = ["" if i == tokenizer.unknown else tokenizer.decode([i]).strip() for i in range(V)]
        before = tokenizer.decode([begin])
        inside = [tokenizer.decode([begin, i]) == before + text for i, text in enumerate(texts)]
        begins = [text != "" and not joined for text, joined in zip(texts, inside, strict=True)]
        says = [any(c.isalnum() for c in text) for text in texts]
        goes_on = [s and (joined or len(t) > 1) for s, t, joined in zip(says, texts, inside, strict=True)]
        letter = torch.zeros(V, dtype=torch.int64).index_fill(0, torch.tensor(alone), 1)
        anything, first = torch.ones(V, dtype=torch.bool), torch.tensor(begins)
        alone_too = first & torch.tensor(says) & (letter == 0)
        return cls(
            _limit(torch.stack((anything, first, alone_too))).to(like.device),
            _limit(torch.stack((anything, torch.tensor(goes_on)))).to(like.device),
            letter.to(like.device),
            torch.arange(2, device=like.device),
        )


def _limit(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)


class Limits:
    """Return the limits of the answers to some requests, a row each; None if a model has no such limits."""

    def __init__(self, rules: OpenAnswers | None, requests: Sequence[Request]) -> None:
        kinds = [_kind(request) for request in requests]
        self._first: Tensor | None = None
        self._is_open: Tensor | None = None
        self._rules = rules
        if rules is not None and any(kinds):
            self._first = torch.stack([rules.first[kind] for kind in kinds])
            self._is_open = torch.stack([rules.is_open[min(kind, 1)] for kind in kinds])

    def __call__(self, logits: Tensor, previous: Tensor | None = None, count: int = 0) -> Tensor:
        """Return limited logits (B, V) after `count` tokens, of which `previous` (B,) are the last."""
        if self._first is None or count > 1:
            return logits
        if previous is None:
            return logits + self._first
        limit = self.second(previous)
        return logits if limit is None else logits + limit

    def second(self, first: Tensor) -> Tensor | None:
        """Return (B, V) to add to the logits after the first tokens (B,); None for no limit."""
        if self._rules is None or self._is_open is None:
            return None
        return self._rules.second[self._rules.is_letter[first] * self._is_open]


def _kind(request: Request) -> int:
    """Return the row of `OpenAnswers.first` for a request."""
    if lists_options(request.question):
        return 0
    return 1 if request.max_new_tokens > 1 else 2
