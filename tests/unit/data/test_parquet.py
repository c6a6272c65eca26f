"""The hub's parquet: the same samples as from the official files, and only the pictures that are drawn."""

from __future__ import annotations

import io
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tempovlm.core.errors import UserError
from tempovlm.data.catalog import load_samples
from tempovlm.data.scoring import score

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


def bare(level: int) -> bytes:
    content = picture(level)["bytes"]
    assert isinstance(content, bytes)
    return content


def write_column(path: Path, rows: list[dict[str, Any]], pictures: Any) -> None:
    """Rows whose pictures are a column of a given type."""
    table = pa.Table.from_pylist([{k: v for k, v in row.items() if k != "image"} for row in rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.append_column("image", pictures), path, row_group_size=2)


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
PICTURE_TYPES = {
    "binary": (pa.binary(), bare),
    "large binary": (pa.large_binary(), bare),
    "binary view": (pa.binary_view(), bare),
    "list of structs": (pa.list_(STRUCT), lambda level: [picture(level)]),
    "list of bytes": (pa.list_(pa.binary()), lambda level: [bare(level)]),
    "numbers": (pa.list_(pa.uint8()), lambda level: list(bare(level))),
    "large struct": (pa.struct([("bytes", pa.large_binary())]), lambda level: {"bytes": bare(level)}),
}


@pytest.mark.parametrize("kind", PICTURE_TYPES)
def test_pictures_of_every_type_are_read(kind: str, tmp_path: Path) -> None:
    arrow, make = PICTURE_TYPES[kind]
    pictures = pa.array([make(i // 2) for i in range(5)], arrow)
    write_column(tmp_path / "text_vqa" / "validation-0.parquet", text_rows(0, 5), pictures)
    samples = load_samples("text_vqa", data_dir=tmp_path)
    assert [level_of(sample.image_path) for sample in samples] == [0, 0, 1, 1, 2]


def test_pictures_of_a_dictionary_column_are_read(tmp_path: Path) -> None:
    pictures = pa.array([bare(i // 2) for i in range(4)], pa.binary()).dictionary_encode()
    write_column(tmp_path / "text_vqa" / "validation-0.parquet", text_rows(0, 4), pictures)
    assert [level_of(s.image_path) for s in load_samples("text_vqa", data_dir=tmp_path)] == [0, 0, 1, 1]


def science_rows(count: int) -> list[dict[str, Any]]:
    return [{"question": f"which {i}?", "choices": ["a", "b"], "answer": 1, "hint": ""} for i in range(count)]


@pytest.mark.parametrize(
    ("arrow", "values"),
    [
        (STRUCT, [picture(0), {"bytes": None, "path": None}, None, {"bytes": b"", "path": ""}, picture(4)]),
        (pa.binary(), [bare(0), None, b"", None, bare(4)]),
        (pa.list_(STRUCT), [[picture(0)], [], None, [None], [picture(4)]]),
    ],
)
def test_rows_whose_picture_is_empty_are_left_out(arrow: Any, values: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "science_qa_img" / "validation-0.parquet"
    write_column(path, science_rows(5), pa.array(values, arrow))
    samples = load_samples("science_qa_img", data_dir=tmp_path)
    assert [sample.question_id for sample in samples] == ["val-0", "val-4"]
    assert [level_of(sample.image_path) for sample in samples] == [0, 4]


@pytest.mark.parametrize(
    ("arrow", "value", "message"),
    [
        (STRUCT, {"bytes": None, "path": "x.jpg"}, r"names its picture \(x\.jpg\) and does not hold it"),
        (STRUCT, {"bytes": None, "path": None}, "has no picture"),
        (pa.binary(), b"GIF or not", "holds 10 bytes that are no picture"),
        (STRUCT, {"bytes": b"<svg/>", "path": None}, "holds 6 bytes that are no picture"),
        (pa.string(), "aGVsbG8=", "holds str in the column image, no bytes"),
        (pa.list_(STRUCT), [picture(0), picture(1)], "holds a list of 2 where one picture belongs"),
        (pa.list_(pa.int32()), [1, 256], "holds a list of 2 where one picture belongs"),
        (pa.struct([("bytes", pa.string())]), {"bytes": "x"}, "holds str in the column image, no bytes"),
    ],
)
def test_what_holds_no_picture_is_named(arrow: Any, value: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "text_vqa" / "validation-0.parquet"
    write_column(path, text_rows(0, 1), pa.array([value], arrow))
    with pytest.raises(UserError, match=rf"validation-0\.parquet: row 0 {message}[^\n]*$"):
        load_samples("text_vqa", data_dir=tmp_path)


def test_two_files_of_equal_name_and_size_keep_their_own_pictures(tmp_path: Path) -> None:
    """Uncompressed, pictures of one size make files of one size."""
    for place, level in (("one", 10), ("two", 200)):
        rows = [row | {"image": {"bytes": bitmap(level), "path": None}} for row in text_rows(0, 2)]
        path = tmp_path / place / "text_vqa" / "validation-0.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), path, compression="none", use_dictionary=False)
    sizes = {path.stat().st_size for path in tmp_path.rglob("validation-0.parquet")}
    assert len(sizes) == 1
    first, second = (load_samples("text_vqa", data_dir=tmp_path / place) for place in ("one", "two"))
    assert [level_of(sample.image_path) for sample in (*first, *second)] == [10, 10, 200, 200]


def test_a_file_that_is_replaced_gives_its_new_pictures(tmp_path: Path) -> None:
    path = tmp_path / "text_vqa" / "validation-0.parquet"
    path.parent.mkdir(parents=True)
    for level in (10, 200, 10):
        rows = [row | {"image": {"bytes": bitmap(level), "path": None}} for row in text_rows(0, 1)]
        pq.write_table(pa.Table.from_pylist(rows), path, compression="none", use_dictionary=False)
        os.utime(path, (1, 1))
        (sample,) = load_samples("text_vqa", data_dir=tmp_path)
        assert level_of(sample.image_path) == level


def test_equal_ids_of_other_pictures_do_not_share_one(tmp_path: Path) -> None:
    rows = [row | {"image_id": "same", "image": picture(i)} for i, row in enumerate(text_rows(0, 3))]
    write(tmp_path / "text_vqa" / "validation-0.parquet", rows)
    assert [level_of(s.image_path) for s in load_samples("text_vqa", data_dir=tmp_path)] == [0, 1, 2]


def bitmap(level: int) -> bytes:
    """A picture whose size does not depend on what it shows."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (level, 0, 0)).save(buffer, "BMP")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("dataset", "row", "message"),
    [
        ("text_vqa", {"answers": ["red", None]}, r"question 34602: answers\[1\] is null"),
        ("text_vqa", {"answers": []}, "question 34602: answers is empty"),
        ("text_vqa", {"answers": [True]}, r"question 34602: answers\[0\] is true"),
        ("coco_2014_vqa", {"answers": [{"answer": None}]}, r"question 34602: answers\[0\]\.answer is null"),
        ("science_qa_img", {"answer": -1}, "row 0: answer is -1"),
        ("science_qa_img", {"answer": "B"}, "row 0: answer is 'B'"),
        ("science_qa_img", {"choices": ["x", None]}, r"row 0: choices\[1\] is null"),
    ],
)
def test_wrong_fields_of_a_row_are_named(dataset: str, row: dict[str, Any], message: str, tmp_path: Path) -> None:
    whole = science_rows(1)[0] | text_rows(0, 1)[0] | row
    write(tmp_path / dataset / "validation-0.parquet", [whole])
    with pytest.raises(UserError, match=rf"validation-0\.parquet: {message}"):
        load_samples(dataset, data_dir=tmp_path)


def test_numbers_among_answers_and_options(tmp_path: Path) -> None:
    write(tmp_path / "text_vqa" / "validation-0.parquet", [text_rows(0, 1)[0] | {"answers": [4.0, 2.5]}])
    assert load_samples("text_vqa", data_dir=tmp_path)[0].answers == ("4", "2.5")
    problem = science_rows(1)[0] | {"choices": [3, 4], "answer": 1.0, "image": picture(0)}
    write(tmp_path / "science_qa_img" / "validation-0.parquet", [problem])
    (sample,) = load_samples("science_qa_img", data_dir=tmp_path)
    assert (sample.options, sample.answer_index) == (("3", "4"), 1)
    single = text_rows(0, 1)[0] | {"answers": "red"}
    write(tmp_path / "okvqa" / "validation-0.parquet", [single])
    assert load_samples("okvqa", data_dir=tmp_path)[0].answers == ("red",)


def test_damaged_pictures_are_named(tmp_path: Path) -> None:
    """The questions can be read, the pages of the pictures cannot."""
    path = tmp_path / "text_vqa" / "validation-0.parquet"
    write(path, text_rows(0, 2))
    group = pq.ParquetFile(path).metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    content = bytearray(path.read_bytes())
    start = columns["image.bytes"].data_page_offset
    content[start : start + 16] = b"\xff" * 16
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"validation-0\.parquet: damaged or half-written"):
        load_samples("text_vqa", data_dir=tmp_path)


@pytest.mark.parametrize("column", ["image", "question"])
def test_two_columns_of_a_name_are_told(column: str, tmp_path: Path) -> None:
    path = tmp_path / "text_vqa" / "validation-0.parquet"
    path.parent.mkdir()
    table = pa.Table.from_pylist(text_rows(0, 2))
    names = [*table.column_names, column]
    pq.write_table(pa.Table.from_arrays([*table.columns, table[column]], names=names), path)
    with pytest.raises(UserError, match=f"{path}: has 2 columns named {column}; keep one"):
        load_samples("text_vqa", data_dir=tmp_path)


@pytest.mark.parametrize("letter", ["a", "é", "画"])
def test_a_long_image_id_names_a_file(letter: str, tmp_path: Path) -> None:
    rows = text_rows(0, 4)
    for row in rows:
        row["image_id"] = letter * 300 + row["image_id"]
    write(tmp_path / "text_vqa" / "validation-0.parquet", rows)
    samples = load_samples("text_vqa", data_dir=tmp_path)
    assert [level_of(sample.image_path) for sample in samples] == [0, 0, 1, 1]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "text_vqa" / "validation-0.parquet", text_rows(0, 2))
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("TEMPOVLM_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file/pictures/text_vqa/.*: cannot be written"):
        load_samples("text_vqa", data_dir=tmp_path)


def test_threads_that_load_at_once_find_whole_pictures(tmp_path: Path) -> None:
    write(tmp_path / "text_vqa" / "validation-0.parquet", text_rows(0, 20))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: load_samples("text_vqa", data_dir=tmp_path), range(4)))
    for samples in found:
        assert [level_of(sample.image_path) for sample in samples] == [i // 2 for i in range(20)]
