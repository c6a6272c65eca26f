"""List which files of a data set exist and which are missing, and download them from the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tempovlm.core.errors import UserError
from tempovlm.data.dataset import SPLITS, Need
from tempovlm.data.files import is_generated
from tempovlm.data.parquet import parquet_files
from tempovlm.data.registry import find


@dataclass(frozen=True, slots=True)
class Report:
    """Present and missing files of a split.

    Attributes:
        present: Paths that were found.
        missing: Paths that were not found, with their addresses.
        kind: 'official', 'synthetic' or 'parquet', by the files that were found.
    """

    split: str
    present: list[Path] = field(default_factory=list)
    missing: list[Need] = field(default_factory=list)
    kind: str = "official"


def check(dataset: str, root: Path) -> list[Report]:
    """Return the present and missing files of a data set, split by split."""
    known, folder, reports = find(dataset), root / dataset, []
    for split in SPLITS:
        if parquet := parquet_files(known, folder, split):
            reports.append(Report(split, parquet, [], "parquet"))
            continue
        report = Report(split, kind="synthetic" if is_generated(folder) else "official")
        for need in known.needs(split):
            found = [folder / path for path in need.paths if _is_there(folder / path)]
            if found:
                report.present.append(found[0])
            else:
                report.missing.append(need)
        reports.append(report)
    return reports


def _is_there(path: Path) -> bool:
    """Whether a file exists and is not empty; a shared folder of generated pictures does not count."""
    if path.is_dir():
        generated = ".." in path.parts and is_generated(path.parent)
        return not generated and any(path.iterdir())
    return path.is_file() and path.stat().st_size > 0


def download(dataset: str, split: str, root: Path, note: Callable[[str], None]) -> Path:
    """Download a split from its hub copy into the data set's folder; resumes an interrupted download.

    Args:
        dataset: data set to download.
        split: 'train' or 'val'.
        root: folder of all data sets.
        note: called with a line of progress.

    Returns:
        The data set's folder.

    Raises:
        UserError: the hub has no copy or cannot be reached, a generated data set is in the way, or a downloaded
            file differs from the hub's.
    """
    known, folder = find(dataset), root / dataset
    if known.hub is None or split not in known.hub.patterns:
        urls = "; ".join(dict.fromkeys(need.url for need in known.needs(split)))
        raise UserError(f"{dataset} {split}: not on the hub in a form that is read here; get it from {urls}")
    if is_generated(folder):
        raise UserError(f"{folder} holds generated data; download elsewhere with --data_dir, or remove it")
    repo_id, pattern = known.hub.repo_id, known.hub.patterns[split]
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
    """Compare the files of a folder with the hub's list of names and SHA-256 sums; return how many were compared.

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
