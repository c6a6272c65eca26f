"""A fourth knob is added by the files that docs/adding.md lists, and by no more than nine."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tempovlm.core.knobs import AXES

ROOT = Path(__file__).resolve().parents[3]
SECTION = (
    (ROOT / "docs" / "adding.md").read_text(encoding="utf-8").partition("\n## A knob\n")[2].partition("\n## ")[0]
)
LISTED = re.findall(r"^\| `(\S+\.py)`", SECTION, re.MULTILINE)

# The toy knob: the share of experts, in per cent, that the second half of the blocks keeps.
EDITS = {
    "src/tempovlm/core/knobs.py": (
        ('"blocks", "blocks"),\n', '"blocks", "blocks"),\n "late": Knob("lates", checked_integer, *"llll"),\n'),
        ("    num_blocks: int\n", "    num_blocks: int\n    late: int\n"),
        ("    block_counts: tuple[int, ...]\n", "    block_counts: tuple[int, ...]\n    lates: tuple[int, ...]\n"),
        ("tuple(sorted(blocks)), shape.top_k", "tuple(sorted(blocks)), (50, 100), shape.top_k"),
    ),
    "src/tempovlm/core/plan.py": (
        (
            "Step(block, knobs.top_k) for block in ranking.blocks(knobs.num_blocks)",
            "Step(b, max(knobs.top_k * (knobs.late if 2 * b >= shape.num_blocks else 100) // 100, 1))"
            " for b in ranking.blocks(knobs.num_blocks)",
        ),
    ),
    "src/tempovlm/core/records.py": (("    num_blocks: int\n", "    num_blocks: int\n    late: int\n"),),
    "src/tempovlm/api.py": (
        ("num_blocks: int | None = None,", "num_blocks: int | None = None, late: int | None = None,"),
        ("top_k, num_blocks)", "top_k, num_blocks, late)"),
    ),
    "src/tempovlm/cli/knobs.py": (
        ("    ranking: Ann", '    late: Annotated[tuple[int, ...], _arg("L")] = ()\n    ranking: Ann'),
    ),
}  # fmt: skip

WALK = """
import dataclasses, json, sys
from pathlib import Path

import numpy as np
import torch

from tempovlm.control.baselines import _arm_features
from tempovlm.control.policies import prior_accuracy
from tempovlm.core.knobs import KnobConfig, KnobSpace
from tempovlm.core.plan import Plan, Ranking
from tempovlm.core.records import SweepRow
from tempovlm.lab.core_exp.plan import choose_settings
from tempovlm.lab.statistics import marginals, shares
from tempovlm.latency.features import CostTable, Workload
from tempovlm.model.weights import read_config
from tempovlm.training.elastic import sample_setting

config = read_config(Path(sys.argv[1]))
space = KnobSpace.for_model(config.shape)
thin = dataclasses.replace(space.native, late=50)
row = SweepRow(dataset="d", split="val", question_id="7", image_id="i", template="t", **thin.as_dict())
plan = Plan.build(thin, Ranking.evenly_spaced(config.num_blocks), config.shape)
table = CostTable(space, config.shape)
flops, _ = table.prefill(Workload.of_request(space, [0] * 3, 20, [None] * 3))
print(json.dumps({
    "shape": space.shape, "text": str(thin),
    "walks": [space.index(one) for one in space] == list(range(len(space))),
    "read": KnobSpace.from_json(space.to_json()) == space,
    "row": SweepRow.from_json(row.to_json()).knobs == thin, "key": row.key,
    "experts": [step.top_k for step in plan.steps],
    "cheaper": bool(flops[space.index(thin)] < flops[space.index(space.native)]),
    "arms": len(np.unique(_arm_features(space), axis=0)), "prior": len(prior_accuracy(space)),
    "swept": len(choose_settings(space, None, None, None, [100])), "shares": marginals(shares([str(thin)]))[3],
    "counts": space.counts["num_lates"],
    "drawn": sample_setting(space, torch.tensor([0.95, 0.1, 0.1, 0.1, 0.1])).late,
}))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with the toy knob; the pocket's card gives both values of it the same accuracy."""
    source = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "src" / "tempovlm", source / "tempovlm", ignore=shutil.ignore_patterns("__pycache__"))
    for path, edits in EDITS.items():
        file = source / Path(path).relative_to("src")
        text = file.read_text(encoding="utf-8")
        for old, new in edits:
            assert old in text, (path, old)
            text = text.replace(old, new)
        file.write_text(text, encoding="utf-8")
    card = source / "tempovlm" / "pocket" / "accuracy.json"
    record = json.loads(card.read_text())
    record["settings"] = [row | {"late": late} for row in record["settings"] for late in (50, 100)]
    card.write_text(json.dumps(record))
    return source


def run(source: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(source)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_at_most_nine_files_are_touched() -> None:
    assert set(EDITS) <= set(LISTED)
    assert len(LISTED) <= 9
    assert all((ROOT / path).is_file() for path in LISTED)


def declared(node: ast.AST) -> set[str]:
    """The fields of a class, or the parameters and flags of a function."""
    if isinstance(node, ast.ClassDef):
        return {
            one.target.id
            for one in node.body
            if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
        }
    parts = list(ast.walk(node))
    texts = [one.value for one in parts if isinstance(one, ast.Constant) and isinstance(one.value, str)]
    return {one.arg for one in parts if isinstance(one, ast.arg)} | {t[2:] for t in texts if t.startswith("--")}


def test_the_list_has_all_that_declare_the_knobs() -> None:
    """A field, parameter or flag for each knob is what no loop over the axes can spare."""
    found = set()
    for path in (path for folder in ("src", "experiments") for path in (ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)):
            names = declared(node)
            if all(names & {name, knob.legal, f"num_{knob.legal}"} for name, knob in AXES.items()):
                found.add(path.relative_to(ROOT).as_posix())
    assert len(found) > 5
    assert found <= set(LISTED)


def test_space_rows_costs_and_policies_follow(copy: Path) -> None:
    done = run(copy, "-c", WALK, str(copy / "tempovlm" / "pocket"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    tiers, top_ks, depths, lates = found["shape"]
    size = tiers * top_ks * depths * lates
    assert (lates, found["counts"], found["prior"], found["arms"], found["swept"]) == (2, 2, size, size, size // 2)
    assert (found["walks"], found["read"], found["row"]) == (True, True, True)
    assert found["cheaper"]
    assert found["text"].endswith("/l50")
    assert found["shares"] == {"l50": pytest.approx(1.0)}
    assert (found["key"][-1], found["drawn"]) == (50, 50)
    assert found["experts"][-1] < found["experts"][0]


ASK = """
import sys
from tempovlm.cli.main import main

for late in "50", "70":
    print("asked", late, file=sys.stderr)
    print(main(["answer", *sys.argv[1:], "--json", "--late", late]))
"""


def test_a_request_can_set_it(copy: Path) -> None:
    """The second one is wrong."""
    done = run(copy, "-c", ASK, str(ROOT / "docs" / "figures" / "sign.jpg"), "what does the purple sign say?")
    assert done.returncode == 0, done.stderr
    answer, *codes = done.stdout.splitlines()
    assert json.loads(answer)["knobs"]["late"] == 50
    assert codes == ["0", "2"]
    (told,) = done.stderr.partition("asked 70\n")[2].splitlines()
    assert "--late 70: not in the knob space of this model; choose from 50, 100" in told
