"""The official layouts of the data sets that are not generated, shared pictures, and what `data check` says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from pkgutil import iter_modules
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tempovlm.cli import main as cli
from tempovlm.cli.bench import BenchArgs
from tempovlm.core.errors import UserError
from tempovlm.data import sets, sources
from tempovlm.data.catalog import load_samples
from tempovlm.data.dataset import SPLITS
from tempovlm.data.registry import DATASETS, GENERATED, SCORED_TOGETHER, check_datasets
from tempovlm.data.sample import Sample
from tempovlm.data.scoring import score
from tempovlm.testbed import stand_ins


def dump(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6)).save(path)


def only(root: Path, dataset: str, split: str = "val") -> Sample:
    (sample,) = load_samples(dataset, split, data_dir=root)
    assert sample.image_path.is_file()
    assert (sample.dataset, sample.data_source, sample.split) == (dataset, "official", split)
    assert sample.style == DATASETS[dataset].style
    return sample


DOCUMENT = {
    "questionId": 49153,
    "question": "What is the 'actual' value per 1000?",
    "question_types": ["figure/diagram", "form"],
    "image": "documents/pybv0228_81.png",
    "docId": 14465,
    "ucsf_document_id": "pybv0228",
    "ucsf_document_page_no": "81",
    "answers": ["0.28", ".28"],
    "data_split": "val",
}


@pytest.mark.parametrize(
    ("questions", "pictures"),
    [
        ("spdocvqa_qas/val_v1.0_withQT.json", "spdocvqa_images"),
        ("val/val_v1.0.json", "val/documents"),
        ("val_v1.0.json", "documents"),
    ],
)
def test_doc_qa(questions: str, pictures: str, tmp_path: Path) -> None:
    dump(tmp_path / "doc_qa" / questions, {"dataset_name": "docvqa", "dataset_split": "val", "data": [DOCUMENT]})
    picture(tmp_path / "doc_qa" / pictures / "pybv0228_81.png")
    sample = only(tmp_path, "doc_qa")
    assert (sample.question_id, sample.image_id) == ("49153", "pybv0228_81")
    assert score(sample, ".28") == pytest.approx(1.0)
    assert score(sample, "0.29") == pytest.approx(0.75)


def test_st_qa(tmp_path: Path) -> None:
    entries = [
        {
            "question_id": 20_000 + i,
            "question": f"what is number {i}?",
            "answers": [str(i)],
            "file_path": f"coco-text/{i}.jpg",
            "dataset": "coco-text",
        }
        for i in range(1100)
    ]
    dump(tmp_path / "st_qa" / "train_task_3.json", {"data": entries})
    val, train = (load_samples("st_qa", split, data_dir=tmp_path) for split in ("val", "train"))
    assert (len(val), len(train)) == (1024, 76)
    ids = {sample.question_id for sample in val}
    assert ids.isdisjoint(sample.question_id for sample in train)
    dump(tmp_path / "st_qa" / "train_task_3.json", {"data": entries[::-1]})
    assert [s.question_id for s in load_samples("st_qa", data_dir=tmp_path)] == [s.question_id for s in val]
    assert val[0].image_path == tmp_path / "st_qa" / val[0].image_id


def test_tally_qa_finds_pictures_of_both_collections(tmp_path: Path) -> None:
    entry = {"answer": 4, "data_source": "amt", "issimple": False, "question": "How many?"}
    entries = [
        entry | {"question_id": 30095774, "image_id": 92410408, "image": "VG_100K_2/2410408.jpg"},
        entry | {"question_id": 2, "image_id": 3, "image": "val2014/COCO_val2014_000000000003.jpg"},
    ]
    dump(tmp_path / "tally_qa" / "test.json", entries)
    picture(tmp_path / "tally_qa" / "VG_100K_2" / "2410408.jpg")
    picture(tmp_path / "coco" / "val2014" / "COCO_val2014_000000000003.jpg")
    first, second = load_samples("tally_qa", data_dir=tmp_path)
    assert (first.question_id, first.image_id, first.template) == ("30095774", "92410408", "complex")
    assert first.image_path.is_file()
    assert second.image_path.is_file()
    assert (score(first, "four"), score(first, "5")) == pytest.approx((1.0, 0.0))


def test_coco_caption(tmp_path: Path) -> None:
    content = {
        "images": [{"id": 42, "file_name": "COCO_val2014_000000000042.jpg"}],
        "annotations": [{"image_id": 42, "id": i, "caption": f"a dog {i}"} for i in range(5)],
    }
    dump(tmp_path / "coco_caption" / "annotations" / "captions_val2014.json", content)
    picture(tmp_path / "coco_2014_vqa" / "val2014" / "COCO_val2014_000000000042.jpg")
    sample = only(tmp_path, "coco_caption")
    assert (sample.question_id, len(sample.answers)) == ("42", 5)
    (tmp_path / "coco_2014_vqa" / "SYNTHETIC.md").write_text("drawn")
    with pytest.raises(UserError, match="val2014 is missing"):
        load_samples("coco_caption", data_dir=tmp_path)


def test_science_qa_keeps_question_and_hint(tmp_path: Path) -> None:
    problem = {"question": "Which is true?", "choices": ["this", "that"], "answer": 1, "image": "image.png"}
    problems = {"7": problem | {"hint": " Look at the table. "}, "8": problem | {"image": None, "hint": ""}}
    dump(tmp_path / "science_qa_img" / "problems.json", problems)
    dump(tmp_path / "science_qa_img" / "pid_splits.json", {"val": ["7", "8"]})
    picture(tmp_path / "science_qa_img" / "images" / "val" / "7" / "image.png")
    sample = only(tmp_path, "science_qa_img")
    assert sample.question == "Look at the table.\nWhich is true?\nA: this\nB: that\n"
    assert sample.question_id == "7"


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tempovlm data check st_qa"):
        load_samples("st_qa", data_dir=tmp_path)
    (tmp_path / "doc_qa").mkdir()
    with pytest.raises(UserError, match=r"val_v1\.0_withQT\.json is missing; tempovlm data check doc_qa"):
        load_samples("doc_qa", data_dir=tmp_path)


def test_every_module_is_named_after_its_data_set() -> None:
    assert {module.name for module in iter_modules(sets.__path__)} == set(DATASETS)
    assert set(stand_ins.NAMES) == set(GENERATED)


def test_every_data_set_has_a_source() -> None:
    for dataset in DATASETS.values():
        needs = [need for split in SPLITS for need in dataset.needs(split)]
        assert all(need.paths and need.url.startswith("http") for need in needs)
        assert dataset.home.startswith("http")


def test_check_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "check", "okvqa", "--data_dir", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert "no split is complete" in err
    for part in ("mscoco_val2014_annotations.json", "https://okvqa.allenai.org/static/data", "val2014.zip"):
        assert part in out
    assert "tempovlm data download okvqa --split val" in out
    folder = tmp_path / "okvqa"
    dump(folder / "OpenEnded_mscoco_val2014_questions.json", {})
    dump(folder / "mscoco_val2014_annotations.json", {})
    picture(tmp_path / "coco" / "val2014" / "a.jpg")
    assert cli.main(["data", "check", "okvqa", "--data_dir", str(tmp_path)]) == 0
    assert "val (official): complete" in capsys.readouterr().out
    assert cli.main(["data", "check", "nothing"]) == 2


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_data_set_has_a_command_that_asks_it(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["data", "check", dataset, "--data_dir", str(tmp_path)])
    assert f"asked by tempovlm bench --dataset {dataset} --data_dir {tmp_path}" in capsys.readouterr().out
    BenchArgs(dataset=(dataset,)).check()
    if dataset not in SCORED_TOGETHER:
        assert check_datasets([dataset], "dataset_names") == [dataset]


@pytest.mark.parametrize("dataset", DATASETS)
def test_what_check_calls_complete_is_found_by_name(dataset: str, tmp_path: Path) -> None:
    """The names that are checked for are those that are read: an empty folder lacks all of them."""
    (report, _) = sources.check(dataset, tmp_path)
    assert len(report.missing) == len(DATASETS[dataset].needs("train"))


def test_download_offline_takes_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "download", "text_vqa", "--data_dir", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "tempovlm: error: text_vqa: the hub cannot be reached" in err
    assert "hf download lmms-lab/textvqa --repo-type dataset" in err
    assert cli.main(["data", "download", "st_qa", "--data_dir", str(tmp_path)]) == 2
    assert "rrc.cvc.uab.es" in capsys.readouterr().err
    (tmp_path / "okvqa").mkdir()
    (tmp_path / "okvqa" / "SYNTHETIC.md").write_text("drawn")
    assert cli.main(["data", "download", "okvqa", "--data_dir", str(tmp_path)]) == 2
    assert "holds generated data" in capsys.readouterr().err


def test_download_checks_what_arrived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    content = b"questions and pictures"
    entry = SimpleNamespace(
        rfilename="data/val-0.parquet", lfs=SimpleNamespace(sha256=hashlib.sha256(content).hexdigest())
    )

    class Api:
        def dataset_info(self, *_: object, **__: object) -> object:
            plain = SimpleNamespace(rfilename="README.md", lfs=None)
            return SimpleNamespace(siblings=[entry, plain])

    def fetch(*_: object, local_dir: Path, **__: object) -> str:
        (local_dir / "data").mkdir(parents=True, exist_ok=True)
        (local_dir / "data" / "val-0.parquet").write_bytes(content)
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    notes: list[str] = []
    assert sources.download("coco_caption", "val", tmp_path, notes.append) == tmp_path / "coco_caption"
    assert "1 files" in notes[-1]
    entry.lfs.sha256 = "0" * 64
    with pytest.raises(UserError, match=r"val-0\.parquet: differs from the hub's file"):
        sources.download("coco_caption", "val", tmp_path, notes.append)
