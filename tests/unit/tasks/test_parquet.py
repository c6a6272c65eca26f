"""The hub's parquet: the same samples as from the official files, and only the pictures that are drawn."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tempovlm.core.errors import UserError
from tempovlm.tasks.base import score
from tempovlm.tasks.catalog import load_samples

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPOVLM_CACHE_DIR", str(tmp_path / "cache"))


def picture(level: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (level, 0, 0)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write(path: Path, rows: list[dict[str, Any]], group: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)


def level_of(path: Path) -> int:
    with Image.open(path) as image:
        return image.getpixel((0, 0))[0]  # type: ignore[index]


def text_rows(start: int, count: int) -> list[dict[str, Any]]:
    return [
        {
            "question_id": 34_602 + i,
            "image_id": f"{i // 2:016x}",
            "question": f"what is {i}?",
            "answers": [str(i)] * 10,
            "image": picture(i // 2),
            "ocr_tokens": ["x"],
        }
        for i in range(start, start + count)
    ]


def test_text_vqa_in_two_files(tmp_path: Path) -> None:
    data = tmp_path / "text_vqa" / "data"
    write(data / "validation-00000-of-00002-abc.parquet", text_rows(0, 6))
    write(data / "validation-00001-of-00002-abc.parquet", text_rows(6, 4))
    write(data / "train-00000-of-00001.parquet", text_rows(100, 1))
    samples = load_samples("text_vqa", data_dir=tmp_path)
    assert [sample.question_id for sample in samples] == [str(34_602 + i) for i in range(10)]
    assert [level_of(sample.image_path) for sample in samples] == [i // 2 for i in range(10)]
    assert all(score(sample, str(i)) == pytest.approx(1.0) for i, sample in enumerate(samples))
    assert {(sample.style, sample.data_source) for sample in samples} == {("text_vqa", "official")}
    assert len(load_samples("text_vqa", "train", data_dir=tmp_path)) == 1


def test_only_drawn_pictures_are_written(tmp_path: Path) -> None:
    write(tmp_path / "text_vqa" / "validation-0.parquet", text_rows(0, 20))
    few = load_samples("text_vqa", data_dir=tmp_path, num_samples=2, seed=3)
    assert len(list((tmp_path / "cache").rglob("*.picture"))) == len({sample.image_id for sample in few})
    more = load_samples("text_vqa", data_dir=tmp_path, num_samples=8, seed=3)
    assert more[:2] == few
    assert all(sample.image_path.is_file() for sample in more)


def test_coco_forms(tmp_path: Path) -> None:
    answers = [{"answer": "red", "answer_confidence": "yes", "answer_id": i} for i in range(10)]
    row = {"question": "what color?", "image": picture(9)}
    vqa = row | {"question_id": 262148000, "image_id": 262148, "answers": answers}
    write(tmp_path / "coco_2014_vqa" / "data" / "validation-00000-of-00068.parquet", [vqa])
    ok = row | {"question_id": 2971475, "answers": ["race", "racing"] * 5}
    write(tmp_path / "okvqa" / "data" / "val2014-00000-of-00002.parquet", [ok])
    raw = row | {"question_id": 5, "answers": [{"answer": "race", "raw_answer": "racing"}] * 10}
    write(tmp_path / "other" / "okvqa" / "validation" / "0000.parquet", [raw])
    caption = {"id": 42, "question_id": "x.jpg", "answer": ["a dog", "the dog"], "image": picture(1)}
    write(tmp_path / "coco_caption" / "data" / "val-00000-of-00013.parquet", [caption])
    (first,) = load_samples("coco_2014_vqa", data_dir=tmp_path)
    assert (first.question_id, first.image_id, first.answers) == ("262148000", "262148", ("red",) * 10)
    (second,) = load_samples("okvqa", data_dir=tmp_path)
    assert (second.question_id, second.image_id, len(second.answers)) == ("2971475", "297147", 10)
    (third,) = load_samples("okvqa", data_dir=tmp_path / "other")
    assert third.answers == ("racing",) * 10
    (fourth,) = load_samples("coco_caption", data_dir=tmp_path)
    assert (fourth.question_id, fourth.answers) == ("42", ("a dog", "the dog"))


def test_documents_and_their_neighbour(tmp_path: Path) -> None:
    row = {
        "questionId": "49153",
        "question": "what is the value?",
        "answers": ["0.28"],
        "ucsf_document_id": "pybv0228",
        "ucsf_document_page_no": "81",
        "image": picture(3),
    }
    write(tmp_path / "doc_qa" / "DocVQA" / "validation-0.parquet", [row])
    write(tmp_path / "doc_qa" / "InfographicVQA" / "validation-0.parquet", [{"x": 1}])
    (sample,) = load_samples("doc_qa", data_dir=tmp_path)
    assert (sample.question_id, sample.image_id) == ("49153", "pybv0228_81")


def test_science_rows_without_a_picture_are_left_out(tmp_path: Path) -> None:
    rows = [
        {
            "question": f"which {i}?",
            "choices": ["a", "b"],
            "answer": 1,
            "hint": "a hint" if i else "",
            "image": picture(i) if i != 1 else None,
        }
        for i in range(4)
    ]
    write(tmp_path / "science_qa_img" / "data" / "validation-0.parquet", rows)
    samples = load_samples("science_qa_img", data_dir=tmp_path)
    assert [sample.question_id for sample in samples] == ["val-0", "val-2", "val-3"]
    assert [level_of(sample.image_path) for sample in samples] == [0, 2, 3]
    assert samples[1].question == "a hint\nwhich 2?\nA: a\nB: b\n"
    assert score(samples[0], "B") == pytest.approx(1.0)


def test_official_files_are_read_where_there_is_no_parquet_of_the_split(tmp_path: Path) -> None:
    write(tmp_path / "text_vqa" / "train-0.parquet", text_rows(0, 1))
    entry = {"question_id": 1, "question": "q", "image_id": "i", "answers": ["x"] * 10}
    (tmp_path / "text_vqa" / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": [entry]}))
    (tmp_path / "text_vqa" / "train_images").mkdir()
    (sample,) = load_samples("text_vqa", data_dir=tmp_path)
    assert sample.image_path.name == "i.jpg"


def test_bad_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text_vqa" / "validation-0.parquet"
    write(path, [{"question": "q"}])
    with pytest.raises(UserError, match=r"validation-0\.parquet: has no column"):
        load_samples("text_vqa", data_dir=tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"validation-0\.parquet: damaged or half-written"):
        load_samples("text_vqa", data_dir=tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"tempovlm\[experiments\]"):
        load_samples("text_vqa", data_dir=tmp_path)
