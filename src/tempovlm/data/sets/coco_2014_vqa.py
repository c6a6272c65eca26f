"""VQAv2: open questions about COCO's pictures."""

from __future__ import annotations

from tempovlm.data.coco import coco_pictures_needed, vqa_files, vqa_reader
from tempovlm.data.dataset import DataSet, HubCopy, Need

_ADDRESS = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa"
_PREFIX = "v2_"


def _needs(split: str) -> tuple[Need, ...]:
    questions, annotations = vqa_files(_PREFIX, split)
    part = split.title()
    return (
        Need((questions,), f"{_ADDRESS}/v2_Questions_{part}_mscoco.zip"),
        Need((annotations,), f"{_ADDRESS}/v2_Annotations_{part}_mscoco.zip"),
        coco_pictures_needed(split),
    )


DATA_SET = DataSet(
    name="coco_2014_vqa",
    order=2,
    style="vqa2",
    home="https://visualqa.org",
    needs=_needs,
    read=vqa_reader(_PREFIX),
    hub=HubCopy(repo_id="lmms-lab/VQAv2", patterns={"val": "data/validation-*.parquet"}),
)
