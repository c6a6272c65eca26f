"""A model with times that follow from its setting, and questions whose right answer is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from stamps import STAMP
from tempovlm.core.knobs import KnobConfig, KnobSpace
from tempovlm.core.request import STAGES, Answer
from tempovlm.core.stamp import Stamp
from tempovlm.data.sample import Sample

SPACE = KnobSpace(("low", "medium", "high"), (4, 6, 8, 10, 12), (8, 10, 12, 14, 16), 8)
_TIER_MS = {"low": 10.0, "medium": 40.0, "high": 90.0}


class FakeModel:
    """Takes the tier's time, 2 ms an expert and 5 ms a block; reads right from the medium tier on.

    Chooses the slowest setting that fits. A picture named `broken.jpg` cannot be read.
    """

    space = SPACE
    profile: Any = None
    device = "cpu"

    def __init__(self) -> None:
        self.profile = self
        self.asked: list[tuple[str, float | None]] = []
        self.prices: list[float] = []

    def p50_total_ms(self, index: int) -> float:
        knobs = SPACE.settings[index]
        return _TIER_MS[knobs.tier] + 2.0 * knobs.top_k + 5.0 * knobs.num_blocks

    def upper_total_ms(self, index: int) -> float:
        return 1.1 * self.p50_total_ms(index)

    def check_price(self, price_per_ms: float) -> None:
        del price_per_ms

    def calibrate(self, force: bool = False) -> None:
        del force

    def stamp(self, data_source: str | None = None) -> Stamp:
        return replace(
            STAMP, hardware="a <fake> machine", model="fake", knob_space=SPACE.fingerprint, data_source=data_source
        )

    def answer(
        self,
        image: Any,
        question: str,
        budget_ms: float | None = None,
        *,
        knobs: KnobConfig | None = None,
        max_new_tokens: int = 16,
        style: str = "vqa2",
        price_per_ms: float = 0.0,
    ) -> Answer:
        del max_new_tokens, style
        self.prices.append(price_per_ms)
        self.asked.append((question, budget_ms))
        if Path(image).name == "broken.jpg":
            raise OSError("broken.jpg: truncated")
        fitting = [i for i in range(len(SPACE)) if budget_ms is None or self.upper_total_ms(i) <= budget_ms]
        chosen = max(fitting, key=self.p50_total_ms, default=0)
        setting = knobs or SPACE.settings[chosen]
        total_ms = self.p50_total_ms(SPACE.index(setting))
        timings_ms = dict.fromkeys(STAGES, total_ms / len(STAGES)) | {"total": total_ms}
        return Answer(
            text="wrong" if setting.tier == "low" else "open",
            knobs=setting,
            timings_ms=timings_ms,
            ttft_ms=total_ms / 2,
            tpot_ms=None,
            budget_ms=budget_ms,
            budget_met=None if budget_ms is None else total_ms <= budget_ms,
            budget_feasible=None if budget_ms is None else bool(fitting),
            predicted=None,
            finish_reason="stop",
            policy="fake",
            num_vision_tokens=100,
            num_text_tokens=10,
            num_output_tokens=1,
            model="fake",
            device="cpu",
            tiling=None,
        )


def sample(number: int, image: str = "a.jpg", **changes: Any) -> Sample:
    """A question whose right answer is `open`."""
    fields: dict[str, Any] = {
        "question_id": f"q{number}",
        "image_id": f"i{number // 2}",
        "image_path": Path(image),
        "question": f"what does sign {number} say?",
        "answers": ("open",) * 10,
        "style": "vqa2",
        "dataset": "text_vqa",
        "split": "val",
        "options": (),
        "answer_index": -1,
        "twin_path": None,
        "data_source": "synthetic",
        "template": "sign_color",
    }
    return Sample(**(fields | changes))
