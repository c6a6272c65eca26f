"""Questions that share an id are refused wherever they are read: their rows would be taken for one another's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tempovlm.core.errors import UserError
from tempovlm.data.catalog import load_mixed, load_samples
from tempovlm.data.registry import GENERATED
from tempovlm.testbed.make import make_testbed


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_testbed(tmp_path_factory.mktemp("beds") / "bed", 1, 3, seed=0, progress=False)


@pytest.fixture
def copy(bed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bed, tmp_path / "bed"))


def change(path: Path, edit: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def same_ids(key: str, field: str = "question_id", count: int = 4) -> Callable[[Any], None]:
    def edit(content: Any) -> None:
        for entry in content[key][:count]:
            entry[field] = content[key][0][field]

    return edit


@pytest.mark.parametrize("dataset", GENERATED)
def test_what_is_drawn_has_an_id_of_its_own(bed: Path, dataset: str) -> None:
    for split in ("train", "val"):
        ids = [sample.question_id for sample in load_samples(dataset, split, data_dir=bed)]
        assert len(set(ids)) == len(ids) > 0


@pytest.mark.parametrize(
    ("dataset", "file", "edit"),
    [
        ("text_vqa", "TextVQA_0.5.1_val.json", same_ids("data")),
        ("coco_2014_vqa", "v2_OpenEnded_mscoco_val2014_questions.json", same_ids("questions")),
        ("coco_2014_vqa", "v2_mscoco_val2014_annotations.json", same_ids("annotations")),
        ("okvqa", "OpenEnded_mscoco_val2014_questions.json", same_ids("questions")),
        ("okvqa", "mscoco_val2014_annotations.json", same_ids("annotations")),
        ("science_qa_img", "pid_splits.json", lambda content: content["val"].extend(content["val"][:1] * 3)),
    ],
)
def test_questions_that_share_an_id(copy: Path, dataset: str, file: str, edit: Callable[[Any], None]) -> None:
    change(copy / dataset / file, edit)
    with pytest.raises(UserError) as caught:
        load_samples(dataset, data_dir=copy, num_samples=1)
    said = str(caught.value)
    assert said.startswith(f"{copy / dataset / file}: question id ")
    assert "is there 4 times" in said
    assert "\n" not in said
    with pytest.raises(UserError, match="is there 4 times"):
        load_mixed([dataset], 1, data_dir=copy)


def test_a_doubled_field_of_a_problem_is_no_doubled_question(copy: Path) -> None:
    path = copy / "science_qa_img" / "problems.json"
    problems = json.loads(path.read_text(encoding="utf-8"))
    text = json.dumps({first: json.loads('{"hint": ""}') | one for first, one in problems.items()})
    path.write_text(text.replace('"hint":', '"hint": "", "hint":'), encoding="utf-8")
    assert load_samples("science_qa_img", data_dir=copy)


def test_problems_that_share_an_id(copy: Path) -> None:
    """A reader of JSON keeps the last of equal keys, so that the others are lost without a word."""
    path = copy / "science_qa_img" / "problems.json"
    text = path.read_text(encoding="utf-8")
    (first, problem), *_ = json.loads(text).items()
    path.write_text(text.replace("{", f"{{{json.dumps(first)}: {json.dumps(problem)}, ", 1), encoding="utf-8")
    with pytest.raises(UserError, match=rf"problems\.json: question id {first} is there 2 times"):
        load_samples("science_qa_img", data_dir=copy)


@pytest.mark.parametrize(
    ("dataset", "file", "entry", "more"),
    [
        ("doc_qa", "val_v1.0.json", {"questionId": 5, "image": "documents/a.png"}, {}),
        ("st_qa", "train_task_3.json", {"question_id": 5, "file_path": "coco-text/1.jpg"}, {}),
        ("tally_qa", "test.json", {"question_id": 5, "image_id": 1, "image": "VG_100K/1.jpg", "answer": 2}, {}),
        (
            "coco_caption",
            "captions_val2014.json",
            {"id": 5, "file_name": "a.jpg"},
            {"annotations": [{"image_id": 5, "caption": "a dog"}]},
        ),
    ],
)
def test_official_files_that_are_not_drawn(
    tmp_path: Path, dataset: str, file: str, entry: dict[str, Any], more: dict[str, Any]
) -> None:
    folder, key = tmp_path / dataset, "images" if more else "data"
    for name in ("documents", "val2014", "VG_100K"):
        (folder / name).mkdir(parents=True)
    same = [{"question": "what?", "answers": ["x"]} | entry for _ in range(4)]
    content = same if dataset == "tally_qa" else {key: same, **more}
    (folder / file).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="question id 5 is there 4 times; give each its own id") as caught:
        load_samples(dataset, data_dir=tmp_path)
    assert str(caught.value).startswith(f"{folder / file}: ")


def test_two_copies_of_a_parquet_file(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    row = {"question_id": 7, "image_id": "a", "question": "what?", "answers": ["x"], "image": {"bytes": b"p"}}
    one, two = (tmp_path / "text_vqa" / place / "validation-0.parquet" for place in ("data", "more"))
    for path in (one, two):
        path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist([row, row | {"question_id": 8}]), path)
    with pytest.raises(UserError) as caught:
        load_samples("text_vqa", data_dir=tmp_path)
    said = str(caught.value)
    assert said.startswith(f"{two} (and {one}): question id 7 is there 2 times; 2 of 4 ids repeat an earlier one")
