"""Company on a CPU: rows of the plain model, and callers who all come at once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_model
from tempovlm.control.guard import Guard
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.plan import Plan
from tempovlm.core.request import Request
from tempovlm.engine.company.company import Company
from tempovlm.engine.company.member import Asked, Member
from tempovlm.engine.company.seats import Seats
from tempovlm.engine.cuda.rows import Arriving, arriving
from tempovlm.engine.engine import Engine
from tempovlm.engine.runner import Runner
from tempovlm.engine.sampling import greedy
from tempovlm.latency.profile import LatencyProfile, OutputLength
from tempovlm.model.cache import KVCache
from tempovlm.model.vision import image


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


SCALE = 1e4
"""Answers are said to take so much longer than they do that what this machine takes does not count."""

READING, STEP = 0.9, 1.5
"""Factors on times alone among others: of a reading, and of a step."""


def with_rows(engine: Engine) -> Engine:
    """An engine on the same model whose company has rows although it is on a CPU."""
    other = Engine(engine.runner.model, engine.runner.tokenizer, name="crowded")
    other.company = Company(other)
    other.company._seats = Seats(PlainRows(other.runner))  # type: ignore[arg-type]
    return other


def shared_profile(engine: Engine) -> LatencyProfile:
    """Of answers of six tokens, alone and among others."""
    return tiny_model.shared_profile(engine.space, OutputLength.exactly(6), SCALE, (READING,), STEP)


def steep(profile: LatencyProfile) -> LatencyProfile:
    """The same profile, where steps take longer the more they run."""
    measurements = []
    for m in profile.measurements:
        knobs = profile.space.settings[m.setting]
        more_ms = m.step_ms[0] * (knobs.num_blocks * knobs.top_k - 1)
        step_ms = tuple(one + more_ms for one in m.step_ms)
        measurements.append(replace(m, step_ms=step_ms, total_ms=m.total_ms + more_ms * len(step_ms)))
    alone = replace(profile, measurements=tuple(measurements), shared=())
    shared = (replace(m, step_ms=STEP * alone.step_ms(m.setting)) for m in profile.shared)
    return replace(alone, shared=tuple(shared))


def asked(budget_ms: float | None, seed: int = 0, **options: Any) -> Request:
    named = {"request_id": f"request {seed}", "question": "stop", "max_new_tokens": 6, **options}
    return Request(images=(tiny_model.picture(seed),), budget_ms=budget_ms, **named)


def slower(engine: Engine) -> KnobConfig:
    """The native setting with as few crops as the cheapest: the prompt fits a row."""
    return replace(engine.space.native, tier=engine.space.cheapest.tier)


def needed_ms(profile: LatencyProfile, knobs: KnobConfig) -> tuple[float, float]:
    """Times for the first token and the five others, among others."""
    index = profile.space.index(knobs)
    return READING * profile.p50_reading_ms(index), 5 * STEP * profile.step_ms(index)


class Arrivals:
    """Callers who come one after the other while the device is busy: who joins, and who stays alone."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine, self.company = engine, company_of(engine)
        self.joined: list[str | None] = []
        self.alone: list[str | None] = []
        self.opened = list[bool]()
        """For each picture that was opened, whether that was in its request's turn."""
        append, line_up = Company._append, Engine.line_up

        def appending(company: Company, member: Member) -> None:
            append(company, member)
            self.joined.append(member.request.request_id)

        def lining_up(engine: Engine, request: Request, *rest: Any, **named: Any) -> Any:
            ticket = line_up(engine, request, *rest, **named)
            self.alone.append(request.request_id)
            return ticket

        pixels = image._pixels

        def opening(*given: Any) -> Any:
            found = pixels(*given)
            self.opened += [] if found is None else [engine.door.is_inside]
            return found

        monkeypatch.setattr(image, "_pixels", opening)
        monkeypatch.setattr(Company, "_append", appending)
        monkeypatch.setattr(Engine, "line_up", lining_up)

    def come(self, pairs: list[tuple[Any, ...]]) -> list[Any]:
        """Return the answers to calls of `Engine.answer` with these arguments, in their order."""
        found: dict[int, Any] = {}
        threads = []
        with self.engine.door.enter(self.engine.door.line_up(0.0)):
            for place, pair in enumerate(pairs):
                call = [lambda pair=pair: self.engine.answer(*pair)]
                run = lambda place=place, call=call: found.update({place: together(call)[0]})  # noqa: E731
                threads.append(threading.Thread(target=run))
                threads[-1].start()
                while len(self.joined) + len(self.alone) <= place:
                    pass
        for thread in threads:
            thread.join()
        return [found[place] for place in range(len(pairs))]


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
