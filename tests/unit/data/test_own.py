"""Your own questions: what a file may hold, how it is scored, and what is said about one that is wrong."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tempovlm.core.errors import UserError
from tempovlm.data import registry
from tempovlm.data.catalog import load_mixed, load_samples
from tempovlm.data.digest import question_digests
from tempovlm.data.metrics.rules import RULES
from tempovlm.data.own import describe, own_name
from tempovlm.data.registry import DATASETS, check_datasets, find_own, task_of
from tempovlm.data.sample import Sample
from tempovlm.data.scoring import score
from tempovlm.data.styles import STYLES


@pytest.fixture(autouse=True)
def _nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("TEMPOVLM_CACHE_DIR", str(tmp_path / "cache"))
    registry._own.clear()
    yield
    registry._own.clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two pictures."""
    for level, name in enumerate(("a.png", "b.png")):
        (tmp_path / name).write_bytes(picture(level))
    return tmp_path


def picture(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (level, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, text: str, name: str = "my.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def one_row(folder: Path, head: str, row: str) -> Sample:
    (sample,) = load_samples(str(write(folder, f"{head}\n{row}\n")))
    return sample


def lines(folder: Path, *rows: dict[str, Any]) -> Path:
    return write(folder, "".join(f"{json.dumps(row)}\n" for row in rows), "my.jsonl")


def test_a_csv_of_three_columns(folder: Path) -> None:
    path = write(folder, 'image,question,answer\na.png,what is it?,open\nb.png,"is it red, or blue?",red\n')
    first, second = load_samples(str(path))
    assert (first.question_id, first.image_id, first.image_path) == ("2", "a.png", folder / "a.png")
    assert (second.question_id, second.question, second.answers) == ("3", "is it red, or blue?", ("red",))
    assert (first.style, first.dataset, first.split, first.rule) == ("vqa2", "my", "val", "exact")
    assert first.data_source.startswith("my.csv ")


@pytest.mark.parametrize("separator", [";", "\t"])
def test_what_spreadsheets_write_is_read(separator: str, folder: Path) -> None:
    rows = [["image", "question", "answer", "notes"], ["a.png", "what?", "open"], ["", "", "", ""], []]
    text = "\ufeff" + "\r\n".join(separator.join(row) for row in rows)
    (sample,) = load_samples(str(write(folder, text)))
    assert (sample.question, sample.answers) == ("what?", ("open",))


@pytest.mark.parametrize(
    ("cell", "answers"),
    [
        ("red|dark red", ("red", "dark red")),
        ('"[""red"", ""dark red""]"', ("red", "dark red")),
        ("red", ("red",)),
        ("[3]", ("3",)),
    ],
)
def test_several_answers_in_a_cell(cell: str, answers: tuple[str, ...], folder: Path) -> None:
    assert one_row(folder, "image,question,answers", f"a.png,what?,{cell}").answers == answers


def test_a_single_answer_may_hold_a_bar(folder: Path) -> None:
    assert one_row(folder, "image,question,answer", "a.png,what?,a|b").answers == ("a|b",)


@pytest.mark.parametrize("given", ["B", "blue", "Blue"])
def test_multiple_choice_by_letter_or_text(given: str, folder: Path) -> None:
    sample = one_row(folder, "image,question,options,answer", f"a.png,which?,red|blue,{given}")
    assert sample.question == "which?\nA: red\nB: blue\n"
    assert (sample.options, sample.answer_index, sample.style) == (("red", "blue"), 1, "science_qa")
    assert score(sample, "B") == pytest.approx(1.0)
    assert score(sample, "red") == pytest.approx(0.0)
    assert task_of("my") == "multiple_choice"


def test_jsonl_with_everything(folder: Path) -> None:
    row = {
        **{"image": {"path": str(folder / "b.png")}, "question": "how many?", "answers": [3, {"answer": "three"}]},
        **{"id": 71, "style": "tally_qa", "split": "train", "score": "anls", "other": None},
    }
    (sample,) = load_samples(str(lines(folder, row)), "train")
    assert (sample.question_id, sample.answers, sample.image_path) == ("71", ("3", "three"), folder / "b.png")
    assert (sample.style, sample.split, sample.rule) == ("tally_qa", "train", "anls")
    with pytest.raises(UserError, match=r"my\.jsonl: has no question of split val; mark some in a column split"):
        load_samples("my")


def test_parquet_holds_pictures_or_names_them(folder: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": picture(7), "path": "x.png"}, {"bytes": None, "path": "b.png"}, {"bytes": picture(9)}]
    rows = [{"image": one, "question": f"{i}?", "answer": "open"} for i, one in enumerate(images)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "my.parquet", row_group_size=2)
    first, second = load_samples(str(folder / "my.parquet"), num_samples=3)[:2]
    samples = {s.question_id: s for s in load_samples("my")}
    assert {first.question_id, second.question_id} < set(samples) == {"0", "1", "2"}
    assert samples["1"].image_path == folder / "b.png"
    assert [samples[name].image_path.read_bytes() for name in "02"] == [picture(7), picture(9)]
    assert len({sample.image_id for sample in samples.values()}) == 3


def test_only_drawn_pictures_of_a_parquet_file_are_written(folder: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"image": picture(i), "question": "what?", "answer": "open"} for i in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "my.parquet")
    drawn = load_samples(str(folder / "my.parquet"), num_samples=2)
    assert len(list((folder / "cache").rglob("*.picture"))) == 2
    assert all(sample.image_path.is_file() for sample in drawn)


@pytest.mark.parametrize(
    ("rule", "answers", "said", "expected", "told"),
    [
        (None, "open", "Open.", 1.0, "one reference a question: scored by exact match after VQA normalisation"),
        ("vqa", "open", "open", 1.0, "one reference a question: scored by exact match after VQA normalisation"),
        ("vqa", "open|open", "open", 1.0, "two or three references a question: scored by exact match"),
        (None, "|".join(["open"] * 2 + ["shut"] * 8), "open", 0.6, "scored by VQA accuracy"),
        ("vqa", "open|open|open|shut", "open", 0.75, "scored by VQA accuracy"),
        ("anls", "open", "opem", 0.75, "one reference a question: scored by ANLS"),
        ("relaxed", "100", "104", 1.0, "one reference a question: scored by relaxed accuracy"),
    ],
)
def test_every_rule(
    rule: str | None, answers: str, said: str, expected: float, told: str, folder: Path, capsys: Any
) -> None:
    path = write(folder, f"image,question,answers\na.png,what?,{answers}\n")
    assert check_datasets([str(path)], "dataset", score=rule) == ["my"]
    (sample,) = load_samples("my")
    assert score(sample, said) == pytest.approx(expected)
    assert f"my.csv: 1 question; {told}" in capsys.readouterr().err
    check_datasets([str(path)], "dataset", score=rule)
    assert capsys.readouterr().err == ""


def test_mixed_rules_are_counted(folder: Path) -> None:
    path = write(
        folder, "image,question,options,answer\na.png,which?,red|blue,A\na.png,what?,,open\nb.png,what?,,shut\n"
    )
    told = describe(load_samples(str(path)))
    assert told.startswith("1 of 3 questions, scored by the option")
    assert "; 2 of 3 questions, one reference a question: scored by exact match" in told


def test_a_changed_file_is_read_anew_and_told_apart(folder: Path) -> None:
    path = write(folder, "image,question,answer\na.png,what?,open\n")
    (before,) = load_samples(str(path))
    assert find_own(str(path)) is find_own("my")
    path.write_text("image,question,answer\na.png,what?,shut\n")
    os.utime(path, ns=(1, 1))
    (after,) = load_samples(str(path))
    assert before.data_source != after.data_source
    assert question_digests([before]) != question_digests([after])
    check_datasets([str(path)], "dataset", score="anls")
    assert question_digests([after]) != question_digests(load_samples("my"))


def test_files_and_data_sets_are_mixed(folder: Path) -> None:
    one = write(folder, "image,question,answer\na.png,1?,x\na.png,2?,x\n", "my-signs.csv")
    other = write(folder, "image,question,answer\nb.png,3?,x\n", "more.csv")
    names = check_datasets([str(one), str(other), str(one)], "dataset")
    assert names == [own_name(one), "more"] == ["my_signs", "more"]
    assert [sample.dataset for sample in load_mixed(names, 9)] == ["my_signs", "more", "my_signs"]


def refused(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        check_datasets([str(path)], "dataset")
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("head", "row", "parts"),
    [
        ("img,question,answer", "a.png,what?,open", ["no column image", "it has img, question, answer"]),
        ("image,question", "a.png,what?", ["no column answer", "answer or answers"]),
        ("image,question,answer,answer", "a.png,what?,x,y", ["2 columns named answer", "keep one"]),
        ("image,question,answer", "c.png,what?,open", ["row 2, column image", "c.png is missing"]),
        ("image,question,answer", "my.csv,what?,open", ["row 2, column image", "is no picture"]),
        ("image,question,answer", "https://x.org/a.png,what?,open", ["row 2, column image", "is an address"]),
        ("image,question,answer", "a.png,,open", ["row 2, column question", "is missing", "leave the row out"]),
        ("image,question,answer", "a.png,\u200b,open", ["row 2, column question", "is empty"]),
        ("image,question,answer", "a.png,what?, ", ["row 2, column answer", "is missing"]),
        ("image,question,answer", "a.png,what?,red,blue", ["row 2: has 4 cells below 3 columns", "quotes"]),
        ("image,question,answer", 'a.png,"what?,open', ["row 2", "unexpected end of data"]),
        ("image,question,answers", "a.png,what?,\"['red', 'blue']\"", ["row 2, column answers", "no JSON"]),
        ("image,question,answers", "a.png,what?,[]", ["row 2, column answers", "is empty"]),
        ("image,question,answers", "a.png,what?,red||blue", ["row 2, column answers", "empty answer"]),
        ("image,question,answer,style", "a.png,what?,x,vqa3", ["row 2, column style", "none of vqa2, text_vqa"]),
        ("image,question,answer,split", "a.png,what?,x,test", ["row 2, column split", "none of train, val"]),
        ("image,question,answer,score", "a.png,what?,x,bleu", ["row 2, column score", "none of exact, vqa"]),
        ("image,question,answer,score", "a.png,what?,x,choice", ["row 2, column options", "is missing"]),
        ("image,question,answer,options", "a.png,which?,,red|blue", ["row 2, column answer", "is missing"]),
        ("image,question,answer,options", "a.png,which?,C,red|blue", ["row 2, column answer", "letter (A to B)"]),
        ("image,question,answer,options,score", "a.png,which?,A,x|y,anls", ["row 2, column options", "choice"]),
        ("image,question,answer,id", "a.png,a?,x,7\nb.png,b?,y,7", ["row 3, column id", "id of row 2 too"]),
        ("image,question,answer", "", ["holds no questions"]),
        ("", "", ["holds no questions"]),
    ],
)
def test_a_wrong_row_is_named_with_its_column(head: str, row: str, parts: list[str], folder: Path) -> None:
    message = refused(write(folder, f"{head}\n{row}\n"))
    assert message.startswith(f"{folder / 'my.csv'}: ")
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"image": "a.png"\n', "row 1: no JSON"),
        ("\n[1]\n", "row 2: is [1]; write one object on each line"),
        ('{"image": 3, "question": "?", "answer": "x"}', "row 1, column image: is 3, neither"),
        ('{"image": "a.png", "question": "?", "answer": true}', "row 1, column answer: is true"),
        ('{"image": "a.png", "question": "?", "answers": [["x"]]}', "row 1, column answers[0]"),
        ('{"image": "a.png", "question": "?", "answer": "x"}\n{"image": "a.png"}', "row 2, column question"),
    ],
)
def test_a_wrong_line_is_named(text: str, part: str, folder: Path) -> None:
    assert part in refused(write(folder, text, "my.jsonl"))


def test_parquet_without_a_picture_or_pyarrow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"image": image, "question": "?", "answer": "x"} for image in (picture(1), None)]
    path = folder / "my.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert "row 1, column image: is missing" in refused(path)
    for kept, lost in (("image", "question"), ("question", "image")):
        pq.write_table(pa.table({kept: ["a.png"]}), path)
        assert f"has no column {lost} (it has {kept})" in refused(path)
    path.write_bytes(b"PAR1")
    assert "damaged or half-written" in refused(path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "needs pyarrow: pip install" in refused(path)


def test_files_that_cannot_stand_for_a_data_set(folder: Path) -> None:
    assert "missing; give a file of questions (.csv, .jsonl, .parquet)" in refused(folder / "none.csv")
    assert "unknown data set; choose from" in refused(folder / "my.xlsx")
    assert "or give a file of your own questions" in refused("mine")
    path = write(folder, "image,question,answer\na.png,what?,x\n", f"{next(iter(DATASETS))}.csv")
    assert "give the file another name" in refused(path)
    (folder / "my.csv").write_bytes("image,question,answer\na.png,wie heißt es?,x\n".encode("latin-1"))
    assert "no UTF-8 text" in refused(folder / "my.csv")
    (folder / "sub").mkdir()
    rows = "image,question,answer\n../a.png,what?,x\n"
    one, other = write(folder / "sub", rows), write(folder, rows.replace("../", ""))
    with pytest.raises(UserError, match=r"--dataset .*my\.csv: results would mix it up with .*sub/my\.csv"):
        check_datasets([str(one), str(other)], "dataset")
    with pytest.raises(UserError, match=r"--score anls: \w+ has a rule of its own"):
        check_datasets([next(iter(DATASETS))], "dataset", score="anls")


def test_styles_of_the_data_sets_are_known() -> None:
    assert {one.style for one in DATASETS.values()} <= set(STYLES)


def test_the_example_of_the_documentation(folder: Path, repo_root: Path) -> None:
    section = (repo_root / "docs" / "adding.md").read_text(encoding="utf-8").partition("## Your own questions")[2]
    text = section.partition("```csv\n")[2].partition("```")[0]
    (folder / "photos").mkdir()
    for name in ("door", "till", "shelf", "yard"):
        (folder / "photos" / f"{name}.jpg").write_bytes(picture(0))
    path = write(folder, text, "shop.csv")
    assert len(text.splitlines()) == 10
    samples = {
        sample.question_id: sample for split in ("train", "val") for sample in load_samples(str(path), split)
    }
    assert list(samples) == [f"s{number}" for number in range(1, 10)]
    assert samples["s5"].question == "what color is the box, left of the tea?"
    assert samples["s7"].answers == ("van", "delivery van", "truck")
    assert (samples["s4"].options[samples["s4"].answer_index], samples["s9"].answer_index) == ("maestro", 0)
    assert [rule for rule in RULES if f"| `{rule}` |" not in section] == []


def test_the_example_file_is_as_the_readme_shows_it(repo_root: Path) -> None:
    path = repo_root / "docs" / "figures" / "questions.csv"
    assert f"```csv\n{path.read_text(encoding='utf-8')}```" in (repo_root / "README.md").read_text(
        encoding="utf-8"
    )
    assert {sample.image_path for sample in load_samples(str(path))} == {path.with_name("sign.jpg")}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (f"{'x' * 5000}.png,q,x", "row 2, column image: xxx"),
        ("~nobody_of_that_name/a.png,q,x", "row 2, column image: ~nobody_of_that_name/a.png is in"),
        (f'a.png,q,"{"[" * 20_000}{"]" * 20_000}"', "row 2, column answer: is [[["),
        ("a.png,q", "row 2, column answer: is missing"),
    ],
)
def test_cells_that_no_file_or_list_can_be_are_told_with_row_and_column(folder: Path, row: str, told: str) -> None:
    path = write(folder, f"image,question,answer\n{row}\n")
    with pytest.raises(UserError) as caught:
        load_samples(str(path))
    assert str(caught.value).startswith(f"{path}: {told}")
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 600


def test_a_cell_may_be_longer_than_the_csv_module_takes_by_default(folder: Path) -> None:
    assert len(one_row(folder, "image,question,answer", f"a.png,{'q' * 200_000},x").question) == 200_000


def test_a_line_of_json_that_is_nested_too_deeply_is_told(folder: Path) -> None:
    path = write(folder, "[" * 100_000 + "\n", "my.jsonl")
    with pytest.raises(UserError, match="row 1: no JSON"):
        load_samples(str(path))
