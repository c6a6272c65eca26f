"""Official files out and in again, nothing half-made, and data where there was none."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tempovlm.cli import data as data_cli
from tempovlm.core.errors import UserError
from tempovlm.data import catalog
from tempovlm.data.catalog import default_data_dir, load_samples
from tempovlm.data.registry import GENERATED
from tempovlm.data.scoring import score
from tempovlm.testbed.generate import make_scene
from tempovlm.testbed.make import make_testbed


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_testbed(tmp_path_factory.mktemp("beds") / "bed", 3, 5, seed=1, progress=False, workers=2)


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("dataset", GENERATED)
@pytest.mark.parametrize(("split", "pictures"), [("train", 3), ("val", 5)])
def test_round_trip(bed: Path, dataset: str, split: str, pictures: int) -> None:
    samples = load_samples(dataset, split, data_dir=bed)
    asked = [q for index in range(pictures) for q in make_scene(dataset, split, index, seed=1).questions]
    assert len(samples) == len(asked)
    assert len({sample.question_id for sample in samples}) == len(samples)
    assert len({sample.image_id for sample in samples}) == pictures
    for sample, question in zip(samples, asked, strict=True):
        assert sample.question.startswith(question.question)
        assert (sample.options, sample.answer_index) == (question.options, question.answer_index)
        assert (sample.template, sample.held_out) == (question.template, question.held_out)
        assert score(sample, question.answer) == pytest.approx(1.0)
        assert sample.data_source == "synthetic"
        assert sample.image_path.is_file()
        assert (sample.twin_path is not None) == (split == "val")
    first = make_scene(dataset, split, 0, seed=1).image
    with Image.open(samples[0].image_path) as image:
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - first.astype(int)).mean() < 6


def test_styles_and_choice_text(bed: Path) -> None:
    styles = {dataset: load_samples(dataset, data_dir=bed)[0].style for dataset in GENERATED}
    assert list(styles.values()) == ["text_vqa", "vqa2", "okvqa", "science_qa"]
    sample = load_samples("science_qa_img", data_dir=bed)[0]
    assert sample.question.splitlines()[1] == f"A: {sample.options[0]}"
    assert sample.question.endswith("\n")


def test_official_names_and_notice(bed: Path) -> None:
    names = {
        "text_vqa/TextVQA_0.5.1_train.json", "text_vqa/TextVQA_0.5.1_val.json",
        "coco_2014_vqa/v2_OpenEnded_mscoco_val2014_questions.json",
        "coco_2014_vqa/v2_mscoco_val2014_annotations.json",
        "okvqa/OpenEnded_mscoco_train2014_questions.json", "okvqa/mscoco_train2014_annotations.json",
        "science_qa_img/problems.json", "science_qa_img/pid_splits.json",
        "SYNTHETIC.md", *(f"{dataset}/SYNTHETIC.md" for dataset in GENERATED),
    }  # fmt: skip
    assert names <= set(_digests(bed))
    assert "stand in" in (bed / "SYNTHETIC.md").read_text()
    assert not list(bed.rglob(".part-*"))


def test_same_seed_same_files_whatever_the_workers(bed: Path, tmp_path: Path) -> None:
    again = make_testbed(tmp_path / "again", 3, 5, seed=1, progress=False, workers=1)
    assert _digests(again) == _digests(bed)


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_reaches_the_total(tmp_path: Path, workers: int) -> None:
    seen: list[tuple[int, int]] = []
    options: dict[str, Any] = {"datasets": ("okvqa",), "workers": workers}
    make_testbed(tmp_path / "bed", 1, 1, progress=lambda done, total: seen.append((done, total)), **options)
    assert seen[-1] == (2, 2)


def test_few_pictures_start_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: Path, share: dict[str, Any], *__: object) -> None:
        raise OSError(f"{share['workers']} processes")

    monkeypatch.setattr("tempovlm.testbed.make._cores", lambda: 8)
    monkeypatch.setattr("tempovlm.testbed.make._run_workers", start)
    assert load_samples("okvqa", data_dir=make_testbed(tmp_path / "few", 1, 1, progress=False))
    for pictures, workers in ((40, 2), (4000, 8)):
        with pytest.raises(UserError, match=f": {workers} processes"):
            make_testbed(tmp_path / "many", pictures, 0, progress=False)


def test_refuses_what_it_would_overwrite(tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        make_testbed(tmp_path, 1, 1)
    with pytest.raises(UserError, match="both 0"):
        make_testbed(tmp_path / "new", 0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    arguments = ["make", "--output_dir", str(tmp_path / "bed"), "--num_train", "9999"]
    code = f"from tempovlm.cli.data import main; main({arguments!r})"
    # A suite that a shell runs in the background ignores interrupts, and so would its children.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True, preexec_fn=heed)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".bed.partial-*/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) != 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["bed", "data"])
def test_what_a_killed_run_left_is_removed(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = tmp_path / f".{out}.partial-a1b2c3d4"
    (left / "okvqa").mkdir(parents=True)
    if out == "bed":
        make_testbed(tmp_path / out, 1, 1, progress=False, datasets=("okvqa",))
    else:
        monkeypatch.setenv("TEMPOVLM_DATA_DIR", str(tmp_path))
        monkeypatch.setattr(catalog, "_SMALL", (1, 1))
        load_samples("okvqa")
    assert not list(tmp_path.glob(".*"))


def test_reads_official_files_without_extra_keys(bed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "okvqa"
    (folder / "val2014").mkdir(parents=True)
    source = bed / "okvqa"
    for name in ("OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json"):
        content = json.loads((source / name).read_text())
        for entry in content.get("annotations", []):
            del entry["template"], entry["held_out"]
        (folder / name).write_text(json.dumps(content))
    sample = load_samples("okvqa", data_dir=tmp_path)[0]
    assert (sample.data_source, sample.template, sample.twin_path) == ("official", "", None)


def test_draw_is_seeded_and_nested(bed: Path) -> None:
    few = load_samples("text_vqa", data_dir=bed, num_samples=4, seed=5)
    more = load_samples("text_vqa", data_dir=bed, num_samples=8, seed=5)
    assert more[:4] == few
    assert len(load_samples("text_vqa", data_dir=bed, num_samples=10**6)) == len(
        load_samples("text_vqa", data_dir=bed)
    )


def test_bad_input_is_named(bed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown data set 'nope'"):
        load_samples("nope")
    with pytest.raises(UserError, match="unknown split 'test'"):
        load_samples("okvqa", "test", data_dir=bed)
    with pytest.raises(UserError, match="num_samples"):
        load_samples("okvqa", data_dir=bed, num_samples=0)
    with pytest.raises(UserError, match="tempovlm data make"):
        load_samples("okvqa", data_dir=tmp_path)
    (tmp_path / "okvqa").mkdir()
    with pytest.raises(UserError, match=r"questions\.json is missing"):
        load_samples("okvqa", data_dir=tmp_path)
    (tmp_path / "okvqa" / "OpenEnded_mscoco_val2014_questions.json").write_text("{")
    with pytest.raises(UserError, match=r"questions\.json: half-written or damaged, not a JSON file"):
        load_samples("okvqa", data_dir=tmp_path)


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TEMPOVLM_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_data_dir() == tmp_path / "tempovlm" / "data"
    monkeypatch.setenv("TEMPOVLM_DATA_DIR", str(tmp_path / "mine"))
    assert default_data_dir() == tmp_path / "mine"


def test_makes_the_test_bed_once_even_for_two_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = "from tempovlm.data import catalog; catalog._SMALL = (1, 2);print(len(catalog.load_samples('okvqa')))"
    environment = os.environ | {"TEMPOVLM_DATA_DIR": str(tmp_path / "data")}
    command = [sys.executable, "-c", code]
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0][0] == outputs[1][0] != ""
    assert "drawing a small synthetic test bed" in outputs[0][1] + outputs[1][1]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == sorted((*GENERATED, "SYNTHETIC.md"))
    monkeypatch.setenv("TEMPOVLM_DATA_DIR", str(tmp_path / "data"))
    assert load_samples("text_vqa")[0].data_source == "synthetic"


def test_unwritable_cache_falls_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TEMPOVLM_DATA_DIR", str(tmp_path / "file" / "data"))
    monkeypatch.setattr(catalog, "_SMALL", (1, 1))
    monkeypatch.setattr(catalog.tempfile, "gettempdir", lambda: str(tmp_path))
    assert load_samples("okvqa")
    assert "cannot be written" in capsys.readouterr().err


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_cli.main(
        ["make", "--output_dir", str(tmp_path / "bed"), "--num-train", "1", "--num_val", "1", "--seed", "2"]
    )
    assert load_samples("text_vqa", "train", data_dir=tmp_path / "bed")
    assert capsys.readouterr().out == ""
    data_cli.main(["--help"])
    assert "make" in capsys.readouterr().out
    with pytest.raises(UserError, match="unknown command 'data fetch'"):
        data_cli.main(["fetch"])
    with pytest.raises(UserError, match="both 0"):
        data_cli.main(["make", "--output_dir", str(tmp_path / "x"), "--num_train", "0", "--num_val", "0"])
