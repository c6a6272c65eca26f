"""Simulates deadlines beside busy processes that come and go: the real guard on a machine that is only computed.

The constants of the guard's margin are chosen by this and not by live timings, which differ from run to run. A
machine does the work of an answer's stages in slices; in company it waits between them, as a scheduler makes it
wait, and now and then something stalls it. Its constants follow `results/backends_cpu.json`,
`backends_cpu_one_thread.json` and `deadlines_cpu.json`: the shares of the pocket's stages, and answers 1.3 to
2.3 times slower beside one to three busy processes. The same seed gives the same result.

Each row asks 400 questions under one budget, a multiple of the native median. One guard goes on learning through
all rows, beside company that works for 5 s and rests for 5 s. A row has the share on time, the mean accuracy
that the card gives to the settings which ran, and the share of the budget that they used. `cheapest` has the
share on time of the cheapest setting, which no guard can exceed.

    python benchmarks/company_simulated.py --json OUT
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from company_cpu import SHARES
from output import write_json
from tempovlm.api import model_folder
from tempovlm.control.guard import Guard
from tempovlm.control.margin import OnlineMargin
from tempovlm.control.policies import TablePolicy
from tempovlm.control.policy import Sight
from tempovlm.core.knobs import KnobConfig, KnobSpace
from tempovlm.core.request import STAGES, Answer, Request
from tempovlm.engine.calibration import PASSES, PICTURE_SIZES
from tempovlm.latency.profile import LatencyProfile, Measurement, OutputLength
from tempovlm.model.config import ModelConfig
from tempovlm.model.files.card import ModelCard
from tempovlm.model.vision.tiling import choose_grid
from tempovlm.model.weights import read_config

SLICE_MS = 3.0
"""Work between two waits for a core."""

SPELL_MS = 5000.0

PLACED_MS = 300.0
"""Duration of the scheduler's placement of processes on cores, which makes company weigh more or less."""

PLACED_SPREAD = 0.15
"""Standard deviation of the logarithm of a placement's weight."""

STALL_EVERY_MS, STALL_MS, STALL_TAIL, LONGEST_STALL_MS = 3000.0, 3.0, 1.5, 150.0
"""Stalls of any machine: their mean distance, and the least, index and cap of their Pareto distribution."""

SPREAD = 0.03
"""Standard deviation of the logarithm of a stage's own time."""

TEST_SIZES = ((448, 360), (448, 336), (384, 384), (480, 320), (320, 480), (450, 300), (512, 288), (336, 448))
"""Widths and heights of the test bed's pictures."""

TEXT_TOKENS = 25

QUESTION = Request(images=(), question="what?", budget_ms=1.0)


@dataclass(frozen=True)
class World:
    """A machine and its company.

    Attributes:
        slower: times that an answer beside company takes, over idle; 1 for none.
        pace: times of the machine over those of the pocket's fastest back end; 1 answers in about 50 ms.
        calibration: times that the machine was slower during the second and the third quarter of its calibration.
    """

    slower: float = 1.0
    pace: float = 1.0
    calibration: float = 1.0


class Machine:
    """Does work in a time that the world and chance decide."""

    def __init__(self, world: World, seed: int, spell_ms: float = SPELL_MS) -> None:
        self.clock_ms = 0.0
        self._world, self._rng, self._spell_ms = world, np.random.default_rng(seed), spell_ms
        self._stall_at_ms, self._placed_until_ms, self._placed = self._rng.exponential(STALL_EVERY_MS), 0.0, 1.0

    def run(self, work_ms: float) -> float:
        """Do work that takes `work_ms` on an idle machine; return the time it took."""
        rng, start_ms, left_ms = self._rng, self.clock_ms, work_ms * float(np.exp(SPREAD * self._rng.normal()))
        while left_ms > 0:
            did_ms = min(left_ms, SLICE_MS)
            left_ms -= did_ms
            self.clock_ms += did_ms
            if self._world.slower > 1 and self.clock_ms // self._spell_ms % 2 == 0:
                if self.clock_ms > self._placed_until_ms:
                    self._placed_until_ms = self.clock_ms + PLACED_MS
                    self._placed = float(np.exp(PLACED_SPREAD * rng.normal()))
                self.clock_ms += rng.gamma(2.0, did_ms * (self._world.slower - 1) * self._placed / 2)
            if self.clock_ms > self._stall_at_ms:
                self.clock_ms += min(STALL_MS * (1 + rng.pareto(STALL_TAIL)), LONGEST_STALL_MS)
                self._stall_at_ms = self.clock_ms + rng.exponential(STALL_EVERY_MS)
        return self.clock_ms - start_ms


class Pocket:
    """The work of the pocket's stages, and what is known of its accuracy."""

    def __init__(self) -> None:
        folder = model_folder("pocket")
        self.config: ModelConfig = read_config(folder)
        self.space = KnobSpace.for_model(self.config.shape)
        card = ModelCard.read(folder, self.space)
        assert card.accuracy is not None
        assert card.length_counts is not None
        self.accuracy, self.output = card.accuracy, OutputLength(card.length_counts)

    def before_ms(self, tier: str, size: tuple[int, int]) -> dict[str, float]:
        """The work of the stages before the second choice on a picture of a width and height."""
        crops = choose_grid(tier, size[1], size[0], self.config.vision).num_crops
        return {
            "preprocess": 1.0 + 0.06 * crops,
            "vision_encoder": 0.6 + 1.1 * crops,
            "projector": 0.3 + 0.13 * crops,
        }

    def after_ms(self, knobs: KnobConfig, size: tuple[int, int], length: int) -> dict[str, float]:
        """The work of prefill, and of the decode steps of an answer of `length` tokens."""
        grid = choose_grid(knobs.tier, size[1], size[0], self.config.vision)
        tokens, share = grid.num_tokens(self.config.vision) + TEXT_TOKENS, knobs.num_blocks / 16
        return {"prefill": 1.5 + 0.075 * tokens * share, "decode": 1.2 * share * (length - 1)}

    def length(self, rng: np.random.Generator) -> int:
        """Draw the tokens of an answer."""
        counts = np.array(self.output.counts, dtype=float)
        return 1 + int(rng.choice(len(counts), p=counts / counts.sum()))


def calibrated(pocket: Pocket, world: World, seed: int = 0) -> LatencyProfile:
    """Measure all settings, as the product does, on an idle machine or in a minute that is partly busy."""
    rng, idle = np.random.default_rng(seed), Machine(World(), seed)
    crowded = Machine(World(slower=world.calibration), seed, spell_ms=np.inf)
    found, total = [], PASSES * len(pocket.space)
    for _ in range(PASSES):
        for index in map(int, rng.permutation(len(pocket.space))):
            machine = crowded if total / 4 <= len(found) < total * 3 / 4 else idle
            knobs, size = pocket.space.settings[index], PICTURE_SIZES[int(rng.integers(len(PICTURE_SIZES)))]
            length, open_ms = pocket.length(rng), machine.run(world.pace)
            prefix_ms = open_ms + sum(
                machine.run(world.pace * ms) for ms in pocket.before_ms(knobs.tier, size).values()
            )
            prefill_ms, decode_ms = (
                machine.run(world.pace * ms) for ms in pocket.after_ms(knobs, size, length).values()
            )
            steps_ms = (decode_ms / (length - 1),) * (length - 1) if length > 1 else ()
            total_ms = prefix_ms + prefill_ms + decode_ms
            found.append(
                Measurement(
                    setting=index,
                    total_ms=total_ms,
                    prefix_ms=prefix_ms,
                    open_ms=open_ms,
                    step_ms=steps_ms,
                    num_output_tokens=length,
                )
            )
    return LatencyProfile("simulated", pocket.space, pocket.output, tuple(found), 0.0, {})


class Bench:
    """Asks a simulated machine through a real guard."""

    def __init__(self, pocket: Pocket, world: World, seed: int = 0) -> None:
        self.pocket, self.world, self._rng = pocket, world, np.random.default_rng([seed, 1])
        profile = calibrated(pocket, world, seed)
        policy = TablePolicy(pocket.space, pocket.accuracy)
        everything = tuple(range(len(pocket.space)))
        self.guard = Guard(policy, pocket.space, everything, profile, 0.1, 0.05, {}, OnlineMargin())
        self.machine = Machine(world, seed)

    def draw(self) -> tuple[tuple[int, int], int]:
        """A picture's size and an answer's length."""
        return TEST_SIZES[int(self._rng.integers(len(TEST_SIZES)))], self.pocket.length(self._rng)

    def ask(self, budget_ms: float) -> Answer:
        """One answer, of which the guard learns."""
        (size, length), run, pace = self.draw(), self.machine.run, self.world.pace
        request = replace(QUESTION, budget_ms=budget_ms)
        opened_ms = run(pace)
        tier = self.guard.choose_tier(request, (size[1], size[0]), opened_ms)
        times_ms = {name: run(pace * ms) for name, ms in self.pocket.before_ms(tier.tier, size).items()}
        picture_ms, sight = sum(times_ms.values()), Sight(tier.tier, None, 0, TEXT_TOKENS)
        times_ms["preprocess"] += opened_ms
        choice = self.guard.choose_compute(request, tier, sight, opened_ms + picture_ms, picture_ms)
        after_ms = self.pocket.after_ms(choice.knobs, size, length)
        times_ms |= {name: run(pace * ms) for name, ms in after_ms.items()}
        answer = answer_of(request, choice.knobs, times_ms, length)
        self.guard.observe(answer, opened_ms)
        return answer

    def native_ms(self, number: int = 200) -> float:
        """The native setting's median on the idle machine."""
        idle, native = Machine(World(), 7), self.pocket.space.native
        took_ms = []
        for _ in range(number):
            size, length = self.draw()
            work = {
                "open": 1.0,
                **self.pocket.before_ms(native.tier, size),
                **self.pocket.after_ms(native, size, length),
            }
            took_ms.append(sum(idle.run(self.world.pace * ms) for ms in work.values()))
        return float(np.median(took_ms))


def answer_of(request: Request, knobs: KnobConfig, times_ms: dict[str, float], length: int) -> Answer:
    """An answer that took these times."""
    total_ms = sum(times_ms.values())
    return Answer(
        text="",
        knobs=knobs,
        timings_ms=dict.fromkeys(STAGES, 0.0) | times_ms | {"total": total_ms},
        ttft_ms=None,
        tpot_ms=None,
        budget_ms=request.budget_ms,
        budget_met=total_ms <= float(request.budget_ms or 0),
        budget_feasible=None,
        predicted=None,
        finish_reason="stop",
        policy="table",
        num_vision_tokens=0,
        num_text_tokens=TEXT_TOKENS,
        num_output_tokens=length,
        model="simulated",
        device="cpu",
        tiling=None,
    )


WORLDS = {
    "alone": World(),
    "beside one": World(slower=1.3),
    "beside two": World(slower=1.7),
    "beside three": World(slower=2.3),
    "slow machine, alone": World(pace=3.0),
    "slow machine, beside two": World(slower=1.7, pace=3.0),
    "slow machine, beside three": World(slower=2.3, pace=3.0),
    "calibrated in a busy minute, alone": World(calibration=1.7),
    "calibrated in a busy minute, beside two": World(slower=1.7, calibration=1.7),
    "calibrated in a busy minute, beside three": World(slower=2.3, calibration=1.7),
}


def rows_of(bench: Bench, num: int) -> list[dict[str, float]]:
    """A row for each budget, in turn by one guard."""
    native_ms, rows = bench.native_ms(), []
    for share in SHARES:
        answers = [bench.ask(share * native_ms) for _ in range(num)]
        row = {
            "budget_ratio": share,
            "on_time": np.mean([bool(a.budget_met) for a in answers]),
            "accuracy": np.mean([bench.pocket.accuracy[a.knobs] for a in answers]),
            "used": np.mean([a.timings_ms["total"] for a in answers]) / (share * native_ms),
        }
        rows.append({name: float(value) for name, value in row.items()})
    return rows


def simulate(pocket: Pocket, world: World, num: int, seeds: int) -> list[dict[str, float]]:
    """The means of several seeds' rows, beside those of the cheapest setting."""
    runs = []
    for seed in range(seeds):
        rows, cheapest = rows_of(Bench(pocket, world, seed), num), Bench(pocket, world, seed)
        cheapest.guard = cheapest.guard.only([pocket.space.index(pocket.space.cheapest)])
        for row, least in zip(rows, rows_of(cheapest, num), strict=True):
            row["cheapest"] = least["on_time"]
        runs.append(rows)
    return [
        {name: round(float(np.mean([row[name] for row in same])), 4) for name in same[0]}
        for same in zip(*runs, strict=True)
    ]


def main() -> None:
    """Simulate and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_samples", type=int, default=400, help="questions a row")
    parser.add_argument("--seeds", type=int, default=5, help="runs of which a row is the mean")
    parser.add_argument("--json", type=Path, help="file to write; standard output without it")
    args = parser.parse_args()
    pocket = Pocket()
    result = {name: simulate(pocket, world, args.num_samples, args.seeds) for name, world in WORLDS.items()}
    write_json({"flags": {"num_samples": args.num_samples, "seeds": args.seeds}, "rows": result}, args.json)


if __name__ == "__main__":
    main()
