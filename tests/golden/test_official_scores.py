"""Our scores against what the owners' own programs gave for generated pairs; the programs are not needed here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tempovlm.data.metrics import captions, choices
from tempovlm.data.metrics import text as scoring
from tempovlm.data.metrics.treebank import words

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("vqa_scores.json").read_text(encoding="utf-8"))


def test_there_are_enough_pairs_and_they_differ() -> None:
    for name in ("vqa", "anls", "choice", "cider"):
        assert len(GOLDEN[name]) >= 200
    for name, field in (("vqa", "vqa"), ("vqa", "text_vqa"), ("anls", "anls"), ("cider", "cider")):
        assert len({row[field] for row in GOLDEN[name]}) >= 5
    assert sum(row["vqa"] != row["text_vqa"] for row in GOLDEN["vqa"]) >= 20


@pytest.mark.parametrize("rule", ["vqa", "text_vqa"])
def test_vqa_accuracy(rule: str) -> None:
    ours = scoring.vqa_accuracy if rule == "vqa" else scoring.text_vqa_accuracy
    for row in GOLDEN["vqa"]:
        assert ours(row["prediction"], row["answers"]) == pytest.approx(row[rule], abs=1e-6), row


def test_anls() -> None:
    for row in GOLDEN["anls"]:
        assert scoring.anls(row["prediction"], row["answers"]) == pytest.approx(row["anls"], abs=1e-9), row


def test_multiple_choice() -> None:
    assert 20 < sum(row["choice"] for row in GOLDEN["choice"]) < 220
    for row in GOLDEN["choice"]:
        said = choices.choice_accuracy(row["prediction"], row["options"], row["answer_index"])
        assert said == pytest.approx(row["choice"]), row


def test_words_of_captions() -> None:
    rows = GOLDEN["cider"]
    assert words([row["prediction"] for row in rows]) == [row["words"] for row in rows]


def test_cider() -> None:
    pytest.importorskip("pycocoevalcap")
    rows = GOLDEN["cider"]
    scores = captions.cider([row["prediction"] for row in rows], [row["answers"] for row in rows])
    assert scores == pytest.approx([row["cider"] for row in rows], abs=1e-6)
