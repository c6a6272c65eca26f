"""The decision table: order, completeness, latencies from another directory, predictions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobSpace
from tempovlm.core.records import COLUMNS, SweepRow
from tempovlm.lab.table import decision_table
from tempovlm.model.config import POCKET

SPACE = KnobSpace.for_model(POCKET.shape)


def rows(question: str, *, image: str = "i", dataset: str = "okvqa") -> list[SweepRow]:
    """A row of every setting; accuracy and output length tell the setting's index."""
    return [
        SweepRow(
            dataset=dataset,
            split="val",
            question_id=question,
            image_id=image,
            template="t",
            tier=knobs.tier,
            top_k=knobs.top_k,
            num_blocks=knobs.num_blocks,
            tiling=(2, 2 + SPACE.tiers.index(knobs.tier)),
            vision_tokens=100 * (1 + SPACE.tiers.index(knobs.tier)),
            text_tokens=12,
            output_tokens=1 + i % 5,
            accuracy=i / 100,
            prediction="yes",
        )
        for i, knobs in enumerate(SPACE)
    ]


def frame(records: list[SweepRow]) -> pd.DataFrame:
    table = pd.DataFrame([{name: getattr(row, name) for name in COLUMNS} for row in records])
    table["T_total"] = table["T_total"].astype(float)
    return table.assign(source="here")


def test_rows_in_any_order_come_out_by_question_and_setting() -> None:
    records = rows("q2", image="b") + rows("q1", image="a")
    shuffled = frame(records).sample(frac=1, random_state=1)
    table = decision_table(shuffled, SPACE, "val")
    assert table.question_id.tolist() == ["q1", "q2"]
    assert table.image_id.tolist() == ["a", "b"]
    np.testing.assert_allclose(table.accuracy[1], np.arange(len(SPACE)) / 100)
    assert table.output_tokens[0, 7] == pytest.approx(3)
    assert table.vision_tokens.tolist() == [pytest.approx([100, 200, 300])] * 2
    assert table.crops[0].tolist() == [[2, 2], [2, 3], [2, 4]]
    assert np.isnan(table.latency_ms).all()
    assert len(table.take(np.array([1]))) == 1
    assert table.take(table.question_id == "q2").image_id.tolist() == ["b"]


def test_a_question_with_a_gap_is_left_out_and_counted() -> None:
    whole, gap = rows("q1"), rows("q2")
    gap[3] = replace(gap[3], accuracy=None, error="failed")
    table = decision_table(frame(whole + gap), SPACE, "val")
    assert len(table) == 1
    assert table.left_out == 1
    with pytest.raises(UserError, match="no question of split val"):
        decision_table(frame(gap), SPACE, "val")


def test_latencies_of_another_directory_join_the_accuracies() -> None:
    timed = [replace(row, accuracy=None, T_total=10.0 + i) for i, row in enumerate(rows("q1"))]
    again = [replace(row, T_total=(row.T_total or 0) + 2) for row in timed]
    table = decision_table(frame(rows("q1") + rows("q2") + timed + again), SPACE, "val")
    np.testing.assert_allclose(table.latency_ms[0], 11.0 + np.arange(len(SPACE)))
    assert np.isnan(table.latency_ms[1]).all()
    np.testing.assert_allclose(table.median_ms(), 11.0 + np.arange(len(SPACE)))
    with pytest.raises(UserError, match="no measured latency"):
        decision_table(frame(rows("q1") + timed[1:]), SPACE, "val").median_ms()


def test_the_same_question_id_in_two_data_sets_stays_two_questions() -> None:
    table = decision_table(frame(rows("q1") + rows("q1", dataset="text_vqa")), SPACE, "val")
    assert table.dataset.tolist() == ["okvqa", "text_vqa"]
