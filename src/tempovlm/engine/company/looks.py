"""Pictures of requests that choose by them: on their way to the host, while the device works for others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tempovlm.control.policy import Sight
from tempovlm.engine.company.member import Member
from tempovlm.engine.company.seats import UnderWay
from tempovlm.engine.company.together import Read
from tempovlm.engine.runner import Runner


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """Members whose pictures were encoded in one turn, each with what its policy sees of its own.

    Attributes:
        ahead: the tokens that were the last on their way when the look began; None without any.
        seen: the device's moment at which the host has all; None where it has them at once.
    """

    reads: tuple[Read, ...]
    sights: tuple[Sight, ...]
    ahead: UnderWay | None
    seen: torch.cuda.Event | None

    @classmethod
    def at(cls, run: Runner, reads: Sequence[Read], ahead: UnderWay | None) -> Look:
        """Begin to copy the pooled tokens of pictures to the host; waits for nothing."""
        sights = []
        for one in reads:
            member = one.member
            sights.append(run.see(member.ready, member.tier.tier, one.vision, pool=True))
        is_cuda = run.device.type == "cuda"
        seen = torch.cuda.current_stream(run.device).record_event() if is_cuda else None
        return cls(tuple(reads), tuple(sights), ahead, seen)

    @property
    def members(self) -> list[Member]:
        """Those who look."""
        return [one.member for one in self.reads]

    @property
    def is_there(self) -> bool:
        """Whether the host has what they see."""
        return self.seen is None or self.seen.query()

    def wait(self) -> None:
        """Wait until the host has it."""
        if self.seen is not None:
            self.seen.synchronize()
