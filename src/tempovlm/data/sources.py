"""Where each data set comes from: the files it consists of, their owners' addresses, and the hub's copies.

It knows names and addresses, says what of them is there and fetches from the hub; it reads no content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tempovlm.core.errors import UserError
from tempovlm.data.files import NOTICE
from tempovlm.data.parquet import parquet_files
from tempovlm.data.sample import DATASETS


@dataclass(frozen=True, slots=True)
class Need:
    """A file or folder of pictures that a split needs.

    Attributes:
        paths: Where it may be, seen from the data set's folder; any one will do.
        url: Where its owner publishes it.
    """

    paths: tuple[str, ...]
    url: str


@dataclass(frozen=True, slots=True)
class HubCopy:
    """A copy on the hub, and the files of each split there."""

    repo_id: str
    patterns: dict[str, str]


@dataclass(frozen=True, slots=True)
class Source:
    """A data set: its home page, what each split needs, and the hub's copy where there is a common one."""

    home: str
    needs: dict[str, tuple[Need, ...]]
    hub: HubCopy | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What of a split is there, and what is missing.

    Attributes:
        present: Paths of what was found.
        missing: What was not, with its address.
        kind: 'official', 'synthetic' or 'parquet', by what was found.
    """

    split: str
    present: list[Path] = field(default_factory=list)
    missing: list[Need] = field(default_factory=list)
    kind: str = "official"


_COCO = "http://images.cocodataset.org"
_VQA = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa"
_OKVQA = "https://okvqa.allenai.org/static/data"
_TEXT_VQA = "https://dl.fbaipublicfiles.com/textvqa"
_SCIENCE = "https://github.com/lupantech/ScienceQA/tree/main/data/scienceqa"
_TALLY = "https://github.com/manoja328/tallyqa/blob/master/tallyqa.zip?raw=true"
_GENOME = "https://cs.stanford.edu/people/rak248/VG_100K_2"


def _coco_pictures(split: str) -> Need:
    name = f"{split}2014"
    return Need((name, f"../coco/{name}", f"../coco_2014_vqa/{name}"), f"{_COCO}/zips/{name}.zip")


def _splits(needs: Callable[[str], tuple[Need, ...]]) -> dict[str, tuple[Need, ...]]:
    return {split: needs(split) for split in ("train", "val")}


def _vqa(split: str) -> tuple[Need, ...]:
    part = split.title()
    questions, annotations = (
        f"v2_OpenEnded_mscoco_{split}2014_questions.json",
        f"v2_mscoco_{split}2014_annotations.json",
    )
    return (
        Need((questions,), f"{_VQA}/v2_Questions_{part}_mscoco.zip"),
        Need((annotations,), f"{_VQA}/v2_Annotations_{part}_mscoco.zip"),
        _coco_pictures(split),
    )


def _okvqa(split: str) -> tuple[Need, ...]:
    questions, annotations = f"OpenEnded_mscoco_{split}2014_questions.json", f"mscoco_{split}2014_annotations.json"
    return (
        Need((questions,), f"{_OKVQA}/{questions}.zip"),
        Need((annotations,), f"{_OKVQA}/{annotations}.zip"),
        _coco_pictures(split),
    )


def _text_vqa(split: str) -> tuple[Need, ...]:
    name = f"TextVQA_0.5.1_{split}.json"
    pictures = Need(("train_images",), f"{_TEXT_VQA}/images/train_val_images.zip")
    return Need((name,), f"{_TEXT_VQA}/data/{name}"), pictures


def _science(split: str) -> tuple[Need, ...]:
    files = (Need((name,), f"{_SCIENCE}/{name}") for name in ("problems.json", "pid_splits.json"))
    return *files, Need((f"images/{split}",), f"https://scienceqa.s3.us-west-1.amazonaws.com/images/{split}.zip")


def _doc_qa(split: str) -> tuple[Need, ...]:
    names = (f"{split}_v1.0_withQT.json", f"{split}_v1.0.json")
    home = "https://rrc.cvc.uab.es/?ch=17&com=downloads (free registration), Single Page Document VQA"
    questions = tuple(f"{place}{name}" for place in ("spdocvqa_qas/", f"{split}/", "") for name in names)
    return Need(questions, home), Need(("spdocvqa_images", f"{split}/documents", "documents"), home)


def _st_qa(_: str) -> tuple[Need, ...]:
    home = "https://rrc.cvc.uab.es/?ch=11&com=downloads (free registration), task 3"
    # The pictures come from six collections, a folder each: one stands for all.
    return Need(("train_task_3.json",), home), Need(("coco-text", "icdar", "VisualGenome"), home)


def _tally_qa(split: str) -> tuple[Need, ...]:
    parts = (("VG_100K", "images.zip"), ("VG_100K_2", "images2.zip"))
    genome = (Need((name,), f"{_GENOME}/{archive}") for name, archive in parts)
    coco = tuple(_coco_pictures(part) for part in (("train", "val") if split == "train" else ("val",)))
    return Need(("train.json" if split == "train" else "test.json",), _TALLY), *coco, *genome


def _coco_caption(split: str) -> tuple[Need, ...]:
    name = f"captions_{split}2014.json"
    archive = f"{_COCO}/annotations/annotations_trainval2014.zip"
    return Need((f"annotations/{name}", name), archive), _coco_pictures(split)


SOURCES: dict[str, Source] = {
    "text_vqa": Source(
        "https://textvqa.org",
        _splits(_text_vqa),
        HubCopy("lmms-lab/textvqa", {"train": "data/train-*.parquet", "val": "data/validation-*.parquet"}),
    ),
    "coco_2014_vqa": Source(
        "https://visualqa.org",
        _splits(_vqa),
        HubCopy("lmms-lab/VQAv2", {"val": "data/validation-*.parquet"}),
    ),
    "okvqa": Source(
        "https://okvqa.allenai.org",
        _splits(_okvqa),
        HubCopy("lmms-lab/OK-VQA", {"val": "data/val2014-*.parquet"}),
    ),
    "science_qa_img": Source(
        "https://scienceqa.github.io",
        _splits(_science),
        HubCopy("derek-thomas/ScienceQA", {"train": "data/train-*.parquet", "val": "data/validation-*.parquet"}),
    ),
    "doc_qa": Source(
        "https://www.docvqa.org",
        _splits(_doc_qa),
        HubCopy("lmms-lab/DocVQA", {"val": "DocVQA/validation-*.parquet"}),
    ),
    "st_qa": Source("https://rrc.cvc.uab.es/?ch=11", _splits(_st_qa)),
    "tally_qa": Source("https://github.com/manoja328/TallyQA_dataset", _splits(_tally_qa)),
    "coco_caption": Source(
        "https://cocodataset.org",
        _splits(_coco_caption),
        HubCopy("lmms-lab/COCO-Caption", {"val": "data/val-*.parquet"}),
    ),
}
"""Where every data set comes from."""


def source_of(dataset: str) -> Source:
    """The source of a data set.

    Raises:
        UserError: there is no data set of that name.
    """
    if dataset not in SOURCES:
        raise UserError(f"unknown data set {dataset!r}; choose one of {', '.join(DATASETS)}")
    return SOURCES[dataset]


def check(dataset: str, root: Path) -> list[Report]:
    """What of a data set is there, split by split."""
    folder, reports = root / dataset, []
    for split, needs in source_of(dataset).needs.items():
        if parquet := parquet_files(folder, split):
            reports.append(Report(split, parquet, [], "parquet"))
            continue
        report = Report(split, kind="synthetic" if (folder / NOTICE).is_file() else "official")
        for need in needs:
            found = [folder / path for path in need.paths if _is_there(folder / path)]
            if found:
                report.present.append(found[0])
            else:
                report.missing.append(need)
        reports.append(report)
    return reports


def _is_there(path: Path) -> bool:
    """Whether a file is there and not empty; a shared folder of generated pictures does not count."""
    if path.is_dir():
        generated = ".." in path.parts and (path.parent / NOTICE).is_file()
        return not generated and any(path.iterdir())
    return path.is_file() and path.stat().st_size > 0


def download(dataset: str, split: str, root: Path, note: Callable[[str], None]) -> Path:
    """Get a split from its hub copy into the data set's folder; what an interrupted run left is used.

    Args:
        dataset: what to get.
        split: 'train' or 'val'.
        root: folder of all data sets.
        note: called with a line about what is being done.

    Returns:
        The data set's folder.

    Raises:
        UserError: the hub has no copy or cannot be reached, a generated data set is in the way, or a file that
            arrived is not the one that the hub has.
    """
    source, folder = source_of(dataset), root / dataset
    if source.hub is None or split not in source.hub.patterns:
        urls = "; ".join(dict.fromkeys(need.url for need in source.needs.get(split, ())))
        raise UserError(f"{dataset} {split}: not on the hub in a form that is read here; get it from {urls}")
    if (folder / NOTICE).is_file():
        raise UserError(f"{folder} holds generated data; download elsewhere with --data_dir, or remove it")
    repo_id, pattern = source.hub.repo_id, source.hub.patterns[split]
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    note(f"getting {pattern} of huggingface.co/datasets/{repo_id} into {folder}")
    try:
        snapshot_download(repo_id, repo_type="dataset", allow_patterns=[pattern], local_dir=folder)
        listed = HfApi().dataset_info(repo_id, files_metadata=True).siblings or []
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise UserError(
            f"{dataset}: the hub cannot be reached or refused ({reason}); where it can be, run: "
            f"hf download {repo_id} --repo-type dataset --include '{pattern}' --local-dir {folder}"
        ) from None
    note("checking what arrived against the hub's checksums")
    checked = verify(folder, listed)
    note(f"{checked} files are as the hub has them")
    return folder


def verify(folder: Path, listed: list[Any]) -> int:
    """Compare the files of a folder with the hub's list of names and SHA-256 sums; the number that were compared.

    Raises:
        UserError: a file differs.
    """
    count = 0
    for entry in listed:
        path = folder / entry.rfilename
        if entry.lfs is None or not path.is_file():
            continue
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != entry.lfs.sha256:
            raise UserError(f"{path}: differs from the hub's file; remove it and download again")
        count += 1
    return count
