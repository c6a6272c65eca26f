"""Rows, stamps and questions for the tests of the sweep and its files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from PIL import Image

import tiny_model
from stamps import STAMP as STAMP
from tempovlm.core.knobs import KnobConfig
from tempovlm.core.records import REPEAT_FIELDS, SweepRow
from tempovlm.data.sample import Sample

SPACE = tiny_model.SPACE


def row(question: int = 0, knobs: KnobConfig = SPACE.native, tokens: int = 3) -> SweepRow:
    """A measured row of two repeats."""
    steps = tokens - 1
    laps = dict.fromkeys(REPEAT_FIELDS, (1.0 + question, 2.0 + question)) | {"T_total": (6.0, 12.0)}
    laps["T_LLM_decode"] = (1.0 * steps, 2.0 * steps)
    return SweepRow(
        dataset="text_vqa",
        split="val",
        question_id=f"q{question}",
        image_id=f"i{question // 2}",
        template="sign",
        tier=knobs.tier,
        top_k=knobs.top_k,
        num_blocks=knobs.num_blocks,
        tiling=(2, 3),
        vision_tokens=140,
        text_tokens=20,
        output_tokens=tokens,
        accuracy=0.3 * (question % 3),
        prediction="stop\u2028here",
        T_preprocess=1.5,
        T_vision_encoder=1.5,
        T_projector=1.5,
        T_LLM_prefill=1.5,
        T_LLM_decode=1.5 * steps,
        T_decode_per_token=1.5 if steps else None,
        T_total=9.0,
        repeats=laps,
        step_ms=((1.0,) * steps, (2.0,) * steps),
    )


def untimed(one: SweepRow) -> SweepRow:
    """The same row of a run in batches."""
    times = dict.fromkeys(name for name in SweepRow.__dataclass_fields__ if name.startswith("T_"))
    return replace(one, **times, repeats=None, step_ms=None)


def rows(questions: Iterable[int] = range(4), settings: Iterable[KnobConfig] = SPACE) -> list[SweepRow]:
    """Measured rows of the even questions and untimed ones of the odd; one question failed."""
    made = [row(q, knobs) if q % 2 == 0 else untimed(row(q, knobs)) for q in questions for knobs in settings]
    blank = dict.fromkeys(("tiling", "vision_tokens", "text_tokens", "output_tokens", "accuracy", "prediction"))
    return [replace(one, **blank, error="OSError: gone") if one.question_id == "q3" else one for one in made]


def questions(folder: Path, count: int = 4) -> list[Sample]:
    """Questions about small pictures of different shapes; two questions a picture."""
    sizes = [(84, 112), (120, 60), (64, 200), (96, 96)]
    words = ("what does the sign say?", "how many dogs?", "is there a stop sign?", "what color is the dog?")
    samples = []
    for i in range(count):
        path = folder / f"{i // 2}.png"
        if not path.exists():
            Image.fromarray(tiny_model.picture(i, *sizes[i // 2 % 4])).save(path)
        samples.append(
            Sample(
                question_id=f"q{i}",
                image_id=f"i{i // 2}",
                image_path=path,
                question=words[i % 4],
                answers=("stop",) * 10,
                style="text_vqa",
                dataset="text_vqa",
                split="val",
                data_source="synthetic",
                template="sign",
            )
        )
    return samples
