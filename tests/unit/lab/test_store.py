from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sweep_fakes import SPACE, STAMP, row, rows, untimed

from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobSpace
from tempovlm.core.plan import Ranking
from tempovlm.core.records import COLUMNS, SweepRow
from tempovlm.lab.core_exp import legacy
from tempovlm.lab.core_exp.store import read_results, read_rows, write_rows

RANKING = Ranking.evenly_spaced(6)

LAPS = dict(row(2).repeats or {})


def write_json(folder: Path, some: list[SweepRow]) -> list[Path]:
    return legacy.write_folder(folder, "text_vqa", some, STAMP, RANKING)


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    some = rows()
    path = write_rows(tmp_path, "text_vqa", some, STAMP)
    assert read_rows(path) == (some, STAMP)
    assert [p.name for p in tmp_path.iterdir()] == ["text_vqa.parquet"]


def test_rows_come_back_from_the_older_layout(tmp_path: Path) -> None:
    some = [*rows(settings=SPACE.settings[:3]), row(7, SPACE.settings[0], tokens=1)]
    paths = write_json(tmp_path, some)
    assert len(paths) == 3
    assert paths[0].parent.name == "text-vqa"
    assert paths[0].name == "text-vqa_imgsizetier-low_crops6_topk2_blocks3.json"
    back = {one.key: one for path in paths for one in legacy.read_file(path, "text_vqa").rows}
    assert len(back) == len(some)
    for one in some:
        assert back[one.key] == one


def test_both_layouts_read_alike(tmp_path: Path) -> None:
    write_rows(tmp_path / "a", "text_vqa", rows(), STAMP)
    write_json(tmp_path / "b", rows())
    one, other = (read_results([tmp_path / name], ["text_vqa"], SPACE) for name in "ab")
    assert list(one.columns) == [*COLUMNS, "source"]
    for read in (one, other):
        assert list(read.attrs["stamps"].values()) == [STAMP.to_json()]
    order = ["question_id", "tier", "top_k", "num_blocks"]
    one, other = (frame.sort_values(order, ignore_index=True) for frame in (one, other))
    for name in COLUMNS:
        left, right = one[name], other[name]
        assert left.isna().equals(right.isna()), name
        assert left.dropna().tolist() == right.dropna().tolist(), name
    both = read_results([tmp_path / "a", tmp_path / "b"])
    assert len(both) == 2 * len(rows())
    assert set(both["source"]) == {str(tmp_path / "a"), str(tmp_path / "b")}
    assert len(both.attrs["stamps"]) == 2


def predecessor(**changes: Any) -> dict[str, Any]:
    """A file as the predecessor wrote it: no single times of the vision side, sample ids that repeat."""
    sample = {
        "sample_id": 0,
        "output_tokens": 3,
        "actual_tiling": [3, 3],
        "actual_vision_tokens": 928,
        "actual_text_tokens": 70,
        "accuracy": 0.9,
        "pred": "stop",
        "metadata": {"question_id": 17, "image_id": 4},
        "T_vision_total": 20.0,
        "T_LLM_prefill": 100.0,
        "T_LLM_decode": 70.0,
        "T_total": 200.0,
        "T_decode_per_token": 35.0,
        "T_decode_per_step": [[35.0], [35.0]],
    }
    other = sample | {"metadata": {}, "output_tokens": 1, "T_LLM_decode": 0.0, "T_decode_per_token": 0.0}
    return {"tier": "high", "top_k": 8, "num_active_blocks": 16, "per_sample_results": [sample, other]} | changes


def test_the_predecessors_own_files_load(tmp_path: Path) -> None:
    space = KnobSpace(("low", "medium", "high"), (4, 6, 8, 10, 12), (8, 10, 12, 14, 16), 8)
    path = tmp_path / "text-vqa" / "text-vqa_imgsizetier-high_crops9_topk8_blocks16.json"
    path.parent.mkdir()
    path.write_text(json.dumps(predecessor()))
    frame = read_results([tmp_path], ["text_vqa"], space)
    first, second = frame.to_dict("records")
    assert (first["question_id"], first["image_id"], first["T_total"]) == ("17", "4", pytest.approx(200.0))
    assert (first["T_vision_encoder"], first["T_projector"]) == pytest.approx((20.0, 0.0))
    assert frame["T_preprocess"].isna().all()
    assert second["question_id"] != first["question_id"]
    assert frame["T_decode_per_token"].isna().tolist() == [False, True]
    assert list(frame.attrs["stamps"].values()) == [None]


def change(name: str, value: Any) -> list[SweepRow]:
    return [row(0), replace(row(2), **{name: value})]


@pytest.mark.parametrize(
    ("some", "named"),
    [
        (change("T_LLM_prefill", -3.0), r"field T_LLM_prefill is a negative time, got -3\.0"),
        (change("T_total", float("inf")), "field T_total is not a finite time"),
        (change("T_vision_encoder", None), "field T_vision_encoder is missing beside other times"),
        (change("T_total", None), "field T_total is missing beside other times: half a measurement"),
        (change("T_LLM_decode", 0.0), "field T_LLM_decode must be positive"),
        (change("T_decode_per_token", None), "field T_decode_per_token must be positive"),
        (change("output_tokens", None), "field output_tokens is missing beside times"),
        (change("accuracy", 1.5), "field accuracy must be between 0 and 1"),
        (change("tier", "huge"), "field tier is outside this model's knob space"),
        (change("top_k", 99), "field top_k is outside this model's knob space"),
        (change("num_blocks", 2), "field num_blocks is outside this model's knob space"),
        (change("dataset", "okvqa"), "field dataset must be text_vqa"),
        (change("question_id", "q0"), "field question_id occurs twice"),
        (change("split", "test"), "field split must be train or val"),
        (change("tiling", (2,)), "field tiling must be rows and columns"),
        (change("tiling", (0, 2)), "field tiling must be rows and columns"),
        (change("repeats", {}), "field repeats must hold equally many"),
        (
            change("repeats", LAPS | {"T_projector": ()}),
            "field repeats must hold equally many",
        ),
        (
            change("repeats", LAPS | {"T_total": (6.0, -1.0)}),
            "field repeats holds a time that is negative or",
        ),
        (
            change("repeats", LAPS | {"T_total": (6.0, math.nan)}),
            "field repeats holds a time that is negative or",
        ),
        ([], "holds no rows"),
    ],
)
def test_wrong_rows_are_named(some: list[SweepRow], named: str, tmp_path: Path) -> None:
    write_rows(tmp_path, "text_vqa", some, STAMP)
    with pytest.raises(UserError, match=named) as caught:
        read_results([tmp_path], None, SPACE)
    assert "text_vqa.parquet" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_directories_are_named(tmp_path: Path) -> None:
    def refused(named: str, datasets: list[str] | None = None) -> None:
        with pytest.raises(UserError, match=named):
            read_results([tmp_path / "out"], datasets, SPACE)

    refused("out: no such results directory")
    (tmp_path / "out").mkdir()
    refused("holds no results")
    (tmp_path / "out" / ".parts").mkdir()
    refused("its sweep is not finished")
    path = write_rows(tmp_path / "out", "text_vqa", rows(), STAMP)
    refused("unknown data set", ["imagenet"])
    refused("no results of okvqa", ["okvqa"])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(r"text_vqa\.parquet: half-written or damaged")
    path.write_bytes(b"")
    refused(r"text_vqa\.parquet: the file is empty")
    write_rows(tmp_path / "out", "text_vqa", rows(), replace(STAMP, knob_space="others"))
    refused("field knob_space of its stamp is others")
    path.rename(path.with_name("imagenet.parquet"))
    refused("unknown data set 'imagenet'")
    with pytest.raises(UserError, match="name at least one"):
        read_results([], None)


def test_foreign_parquet_files_are_named(tmp_path: Path) -> None:
    import pandas as pd

    path = tmp_path / "text_vqa.parquet"
    pd.DataFrame({"question_id": ["q0"]}).to_parquet(path)
    with pytest.raises(UserError, match="no column dataset"):
        read_results([tmp_path])
    records = [one.to_json() | {"top_k": "many"} for one in rows()]
    pd.DataFrame(records).to_parquet(path)
    with pytest.raises(UserError, match="a column has the wrong type"):
        read_results([tmp_path])
    pd.DataFrame([one.to_json() for one in rows()]).to_parquet(path)
    with pytest.raises(UserError, match=r"field tempovlm\.stamp is missing"):
        read_results([tmp_path])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "not valid JSON"),
        (json.dumps(predecessor())[:200], "half-written or damaged"),
        ("[]", "not a JSON object"),
        (json.dumps({"tier": "high"}), "field per_sample_results is missing"),
        (json.dumps(predecessor(per_sample_results=3)), "field per_sample_results is no list"),
        (json.dumps(predecessor(per_sample_results=[])), "holds no rows"),
        (json.dumps(predecessor(per_sample_results=[{}])), r"field per_sample_results\[0\]\.actual_tiling"),
        (json.dumps(predecessor(top_k="many")), r"per_sample_results\[0\] cannot be read"),
        (json.dumps(predecessor(failed_samples=3)), "field failed_samples is no list"),
        (json.dumps(predecessor(stamp={})), "field stamp: the stamp has no field 'hardware'"),
        (json.dumps(predecessor(stamp=3)), "field stamp: "),
    ],
)
def test_wrong_json_files_are_named(text: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "text-vqa" / "text-vqa_imgsizetier-high_crops9_topk8_blocks16.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(UserError, match=named) as caught:
        read_results([tmp_path])
    assert "text-vqa" in str(caught.value)


def test_json_files_of_two_models_are_not_one(tmp_path: Path) -> None:
    legacy.write_folder(tmp_path, "text_vqa", rows([0], SPACE.settings[:1]), STAMP, RANKING)
    other = replace(STAMP, weights="another")
    legacy.write_folder(tmp_path, "text_vqa", rows([0], SPACE.settings[1:2]), other, RANKING)
    with pytest.raises(UserError, match="field weights of its files' stamps differs"):
        read_results([tmp_path])


def test_a_directory_that_is_named_twice_counts_once(tmp_path: Path) -> None:
    write_rows(tmp_path, "text_vqa", [row(0)], STAMP)
    assert len(read_results([tmp_path, tmp_path])) == 1


def test_a_row_without_a_field_is_named() -> None:
    record = untimed(row()).to_json()
    assert SweepRow.from_json(record) == untimed(row())
    del record["accuracy"]
    with pytest.raises(UserError, match="part 3: no field accuracy"):
        SweepRow.from_json(record, "part 3")
