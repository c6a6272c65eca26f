"""What a test bed was drawn from: told by its notice, named by results, drawn where it is missing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tempovlm.core.errors import UserError
from tempovlm.data import catalog
from tempovlm.data.catalog import bed_of, folder_of, load_samples
from tempovlm.data.registry import GENERATED
from tempovlm.lab.core_exp.questions import MANIFEST, bed_of_results
from tempovlm.testbed import EDITION, NOTICE
from tempovlm.testbed.bed import Bed
from tempovlm.testbed.make import make_testbed

SMALL = Bed(num_train=2, num_val=1, seed=3)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default folder of data sets, not there yet."""
    monkeypatch.setenv(catalog.DATA_DIR_VARIABLE, str(tmp_path / "data"))
    monkeypatch.setattr(catalog, "_SMALL", (1, 1))
    return tmp_path / "data"


def make(folder: Path, bed: Bed = SMALL) -> Path:
    return make_testbed(folder, bed.num_train, bed.num_val, bed.seed, progress=False, datasets=GENERATED)


def test_a_notice_tells_what_was_drawn(tmp_path: Path) -> None:
    folder = make(tmp_path / "bed")
    assert Bed.read(folder) == Bed.read(folder / "okvqa") == SMALL
    assert SMALL.command("DIR") in (folder / NOTICE).read_text()
    assert bed_of(GENERATED, folder) == SMALL
    assert Bed.from_json(json.loads(json.dumps(SMALL.to_json())), "here") == SMALL
    assert Bed.read(tmp_path) is None


def test_what_names_no_edition_is_of_the_first(tmp_path: Path) -> None:
    (tmp_path / NOTICE).write_text(f"- made again by: `{SMALL.command()}`\n")
    assert Bed.read(tmp_path) == replace(SMALL, edition=1)
    told = {name: value for name, value in SMALL.to_json().items() if name != "edition"}
    assert Bed.from_json(told, "here") == replace(SMALL, edition=1)
    (tmp_path / NOTICE).write_text("drawn")
    assert Bed.read(tmp_path) is None


@pytest.mark.parametrize(
    ("changes", "covers"),
    [
        ({}, True),
        ({"num_train": 1}, True),
        ({"num_val": 2}, False),
        ({"num_train": 3}, False),
        ({"seed": 4}, False),
        ({"edition": EDITION + 1}, False),
    ],
)
def test_a_larger_bed_has_the_pictures_of_a_smaller_one(changes: dict[str, int], covers: bool) -> None:
    assert SMALL.covers(replace(SMALL, **changes)) == covers


@pytest.mark.parametrize("record", [{"num_train": 1}, {"num_train": "x", "num_val": 1}, {"pictures": 1}, [1]])
def test_a_damaged_record_is_named(record: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"^results/sweep\.json: field bed is half-written or damaged"):
        Bed.from_json(record, "results/sweep.json")


def test_the_default_folder_serves_where_it_has_the_pictures(root: Path) -> None:
    make(root)
    assert folder_of(SMALL) == folder_of(replace(SMALL, num_train=1)) == root
    assert not (root / "beds").exists()


def test_a_missing_bed_is_drawn_once(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_samples("okvqa")  # makes the small one, of another seed
    own = folder_of(SMALL)
    assert own == root / "beds" / SMALL.name
    assert Bed.read(own / "text_vqa") == SMALL
    assert "drawing the synthetic test bed that the results are about in" in capsys.readouterr().err
    (own / "okvqa").rename(own / "lost")
    assert folder_of(SMALL) == own
    assert load_samples("okvqa", "train", data_dir=own)
    capsys.readouterr()
    assert folder_of(SMALL) == own
    assert capsys.readouterr().err == ""
    assert bed_of(["okvqa"]) == Bed(num_train=1, num_val=1)


def test_an_edition_that_is_not_drawn_any_more_is_refused_unless_it_is_there(root: Path) -> None:
    old = replace(SMALL, edition=EDITION + 7)
    with pytest.raises(
        UserError, match=rf"edition {old.edition} of the test bed, this version draws edition {EDITION}"
    ):
        folder_of(old)
    for name in GENERATED:
        (root / "beds" / old.name / name).mkdir(parents=True)
    assert folder_of(old) == root / "beds" / old.name


def test_pictures_of_another_edition_are_left_alone_and_not_asked_about(root: Path) -> None:
    make(root)
    for notice in root.rglob(NOTICE):
        old, new = (f"edition of the questions: {edition}" for edition in (EDITION, EDITION - 1))
        notice.write_text(notice.read_text().replace(old, new))
    assert load_samples("okvqa")
    assert bed_of(["okvqa"]) == Bed(num_train=1, num_val=1)
    assert bed_of(["okvqa"], root) == replace(SMALL, edition=EDITION - 1)
    assert load_samples("okvqa", data_dir=root)


def write_manifest(folder: Path, split: str, bed: Bed | None) -> Path:
    folder.mkdir()
    named = {} if bed is None else {"bed": bed.to_json()}
    (folder / MANIFEST).write_text(json.dumps({"conditions": {"split": split}, **named}))
    return folder


def test_results_of_a_split_name_the_largest_of_their_beds(tmp_path: Path) -> None:
    one = write_manifest(tmp_path / "one", "train", SMALL)
    more = write_manifest(tmp_path / "more", "train", replace(SMALL, num_train=1, num_val=9))
    other = write_manifest(tmp_path / "other", "val", replace(SMALL, seed=8))
    silent = write_manifest(tmp_path / "silent", "train", None)
    assert bed_of_results([one, more, other, silent, tmp_path], "train") == replace(SMALL, num_val=9)
    assert bed_of_results([silent], "train") is None
    with pytest.raises(UserError, match="field bed has another seed or edition"):
        bed_of_results([one, write_manifest(tmp_path / "bad", "train", replace(SMALL, seed=8))], "train")
