"""A data set is added by the modules that docs/adding.md shows, and by nothing else."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[3]
FILES = dict(
    re.findall(
        r"^`(src/\S+/plant_qa\.py)`:\n\n```python\n(.*?)^```$",
        (ROOT / "docs" / "adding.md").read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
)
DATA_SET, STAND_IN = "src/tempovlm/data/sets/plant_qa.py", "src/tempovlm/testbed/stand_ins/plant_qa.py"
QUESTION: dict[str, Any] = {
    "question_id": 7,
    "image_id": "fern",
    "question": "what plant is this?",
    "answers": ["a fern", "fern"],
}

LOAD = """
import json, sys
from tempovlm.data.catalog import load_samples
from tempovlm.data.scoring import score

sample, *others = load_samples("plant_qa", data_dir=sys.argv[1])
said = sample.answers[0]
print(json.dumps({
    "id": sample.question_id, "style": sample.style, "source": sample.data_source, "count": 1 + len(others),
    "picture": sample.image_path.is_file(), "twin": bool(sample.twin_path), "template": sample.template,
    "right": score(sample, said), "near": score(sample, said + "s"), "wrong": score(sample, "xylophone"),
}))
"""
LISTS = """
import json
from tempovlm.cli.bench import BenchArgs
from tempovlm.data.registry import DATASETS, GENERATED, SCORED_TOGETHER, check_datasets
from tempovlm.training.pictures import MIXTURE

BenchArgs(dataset=tuple(check_datasets(["plant_qa", "okvqa"], "dataset"))).check()
print(json.dumps({
    "last": [list(DATASETS)[-1], GENERATED[-1]], "together": "plant_qa" in SCORED_TOGETHER,
    "mixture": [len(MIXTURE), float(sum(MIXTURE))], "default": BenchArgs().dataset[-1],
}))
"""


class Package:
    """A copy of the package, without the pocket's weights, with further files."""

    def __init__(self, root: Path, *added: str) -> None:
        self.source = root / "src"
        left_out = shutil.ignore_patterns("__pycache__", "pocket")
        shutil.copytree(ROOT / "src" / "tempovlm", self.source / "tempovlm", ignore=left_out)
        for path in added:
            assert not (root / path).exists()
            (root / path).write_text(FILES[path], encoding="utf-8")

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command, environment = [sys.executable, *arguments], os.environ | {"PYTHONPATH": str(self.source)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    def told(self, code: str, *arguments: str) -> dict[str, Any]:
        done = self.run("-c", code, *arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return Package(tmp_path_factory.mktemp("real"), DATA_SET)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return Package(tmp_path_factory.mktemp("generated"), DATA_SET, STAND_IN)


def photograph() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_one_module_adds_a_data_set(real: Package, tmp_path: Path) -> None:
    check = ("-m", "tempovlm", "data", "check", "plant_qa", "--data_dir", str(tmp_path))
    nothing = real.run(*check)
    assert nothing.returncode == 2
    assert "photos\n           from https://example.org/plants/photos.zip" in nothing.stdout
    assert "tempovlm data download plant_qa --split val" in nothing.stdout
    folder = tmp_path / "plant_qa"
    (folder / "photos").mkdir(parents=True)
    (folder / "val.json").write_text(json.dumps({"questions": [QUESTION]}))
    (folder / "photos" / "fern.jpg").write_bytes(photograph())
    complete = real.run(*check)
    assert complete.returncode == 0
    assert "val (official): complete" in complete.stdout
    found = real.told(LOAD, str(tmp_path))
    assert found == {
        "id": "7", "style": "okvqa", "source": "official", "count": 1, "picture": True, "twin": False,
        "template": "", "right": pytest.approx(1.0), "near": pytest.approx(6 / 7), "wrong": pytest.approx(0.0),
    }  # fmt: skip


def test_its_copy_on_the_hub_is_read(real: Package, tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "plant_qa" / "data").mkdir(parents=True)
    rows = [QUESTION | {"image": {"bytes": photograph(), "path": None}}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "plant_qa" / "data" / "val-0.parquet")
    found = real.told(LOAD, str(tmp_path))
    assert (found["id"], found["picture"], found["right"]) == ("7", True, pytest.approx(1.0))


def test_a_second_module_draws_it(generated: Package, tmp_path: Path) -> None:
    bed = tmp_path / "bed"
    made = generated.run("-m", "tempovlm", "data", "make", "--out", str(bed), "--num_train", "1", "--num_val", "2")
    assert made.returncode == 0, made.stderr
    found = generated.told(LOAD, str(bed))
    told = {key: found[key] for key in ("source", "count", "picture", "twin", "template", "right")}
    assert told == {
        "source": "synthetic", "count": 2, "picture": True, "twin": True, "template": "plant_color",
        "right": pytest.approx(1.0),
    }  # fmt: skip


def test_every_list_has_it(generated: Package, real: Package) -> None:
    found = generated.told(LISTS)
    assert found["last"] == ["plant_qa", "plant_qa"]
    assert found["default"] == "plant_qa"
    assert not found["together"]
    assert found["mixture"] == [5, pytest.approx(1.0)]
    assert real.told(LISTS)["mixture"] == [4, pytest.approx(1.0)]
