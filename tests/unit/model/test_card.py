from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny_model
from tempovlm.core.errors import UserError
from tempovlm.model.files.card import ModelCard

SPACE = tiny_model.SPACE


def record(settings: int | None = None) -> dict[str, object]:
    rows = [
        {"tier": k.tier, "top_k": k.top_k, "num_blocks": k.num_blocks, "accuracy": i / 100, "num_samples": 50}
        for i, k in enumerate(SPACE)
    ]
    return {
        "settings": rows[:settings],
        "ranking": [5, 0, 3, 1, 2, 4],
        "output_tokens": {"mean": 3.4, "p50": 3, "p97": 7, "counts": [0, 5, 3, 2]},
        "weights": "abc",
    }


def test_option_letters(tmp_path: Path) -> None:
    path = tmp_path / "accuracy.json"
    path.write_text(json.dumps(record() | {"option_letters": "ABC"}))
    assert ModelCard.read(tmp_path, SPACE).option_letters == "ABC"
    path.write_text(json.dumps(record()))
    assert ModelCard.read(tmp_path, SPACE).option_letters == ""
    path.write_text(json.dumps(record() | {"option_letters": ["A"]}))
    with pytest.raises(UserError, match="field option_letters"):
        ModelCard.read(tmp_path, SPACE)


def test_read(tmp_path: Path) -> None:
    (tmp_path / "accuracy.json").write_text(json.dumps(record()))
    card = ModelCard.read(tmp_path, SPACE)
    assert card.accuracy is not None
    assert card.accuracy[SPACE.settings[7]] == pytest.approx(0.07)
    assert card.ranking is not None
    assert card.ranking.order == (5, 0, 3, 1, 2, 4)
    assert card.length_counts == (0, 5, 3, 2)


def test_absent(tmp_path: Path) -> None:
    assert ModelCard.read(tmp_path, SPACE) == ModelCard()


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps(record(3)), '{"settings": [{"tier": 1}]}'])
def test_damaged(content: str, tmp_path: Path) -> None:
    path = tmp_path / "accuracy.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"accuracy\.json"):
        ModelCard.read(tmp_path, SPACE)
