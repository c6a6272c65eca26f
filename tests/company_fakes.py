"""Company on a CPU: rows of the plain model, and callers who all come at once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tempovlm.control.guard import Guard
from tempovlm.core.errors import UserError
from tempovlm.core.plan import Plan
from tempovlm.core.request import Request
from tempovlm.engine.company.company import Company
from tempovlm.engine.company.member import Asked
from tempovlm.engine.cuda.rows import Arriving, arriving
from tempovlm.engine.engine import Engine
from tempovlm.engine.runner import Runner
from tempovlm.engine.sampling import greedy
from tempovlm.model.cache import KVCache


def company_of(engine: Engine) -> Company:
    assert engine.company is not None
    return engine.company


class PlainRows:
    """Rows of the plain model: each with a cache of its own."""

    def __init__(self, run: Runner) -> None:
        self._run = run
        self._rows: dict[int, list[Any]] = {}
        self._read: dict[int, tuple[Plan, KVCache]] = {}
        self.most = 0

    @property
    def free(self) -> list[int]:
        return [row for row in range(4) if row not in self._rows]

    def fits(self, length: int, max_new_tokens: int) -> bool:
        return length < 250 and max_new_tokens > 0

    def reads_at_once(self, plan: Plan, total: int) -> bool:  # noqa: ARG002
        return total < 300

    def read(self, prompts: Sequence[Tensor], rows: Sequence[int], plan: Plan) -> Tensor:
        made = []
        for x, row in zip(prompts, rows, strict=True):
            cache = KVCache.allocate(self._run.model.config, len(plan.steps), 1, len(x) + 8, x)
            made.append(self._run.read(x.unsqueeze(0), plan, cache))
            self._read[row] = plan, cache
        return torch.cat(made)

    def copy_in(self, row: int, cache: KVCache, plan: Plan, length: int) -> None:  # noqa: ARG002
        self._read[row] = plan, cache

    def join(
        self, rows: Sequence[int], plan: Plan, lengths: Sequence[int], first: Tensor, limit: Tensor | None = None
    ) -> None:
        assert limit is None
        for row, length, token in zip(rows, lengths, first.split(1), strict=True):
            assert self._read[row][0] is plan
            self._rows[row] = [token, length]
        self.most = max(self.most, len(self._rows))

    def leave(self, row: int) -> None:
        del self._rows[row]

    @torch.inference_mode()
    def advance(self) -> Arriving:
        tokens = torch.full((4,), -1)
        for row, state in self._rows.items():
            logits = self._run.model.decode(state[0], *self._read[row], state[1])
            state[0], state[1] = greedy(logits), state[1] + 1
            tokens[row] = state[0]
        return arriving(tokens)


def at_once(company: Company, engine: Engine, pairs: list[tuple[Request, Guard]]) -> list[Any]:
    """What callers get who are all ready before the first one is answered."""
    found: list[Any] = []
    calls = [lambda pair=pair: company.answer(Asked(*pair, 0.0)) for pair in pairs]
    thread = threading.Thread(target=lambda: found.extend(together(calls)))
    with engine.door.enter(engine.door.line_up(0.0)):
        thread.start()
        while len(company._pending) < len(pairs):
            pass
    thread.join()
    return found


def together(calls: list[Any]) -> list[Any]:
    """What calls return or raise that are made by threads at once."""
    found: dict[int, Any] = {}

    def run(place: int) -> None:
        try:
            found[place] = calls[place]()
        except UserError as error:
            found[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[place] for place in range(len(calls))]
