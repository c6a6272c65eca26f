from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scripts import script

import tiny_model
from tempovlm.core.errors import UserError
from tempovlm.core.records import SweepRow
from tempovlm.core.stamp import Stamp
from tempovlm.lab.core_exp import store
from tempovlm.lab.exp7_profiles.summary import frontier, summarise
from tempovlm.lab.statistics import clustered_mean

SCRIPT = "controller/profiling_with_importance"
PREDECESSOR = {
    *("tier", "top_k", "num_blocks", "selected_blocks", "dataset", "accuracy", "T_vision_total", "T_LLM_prefill"),
    *("T_LLM_decode", "T_total", "T_decode_per_token", "vision_tokens", "text_tokens", "output_tokens"),
}


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    path = tmp_path / "merged_scores.json"
    path.write_text(json.dumps({"merged_scores": {str(block): 0.1 * block for block in range(6)}}))
    return path


def words(folder: Path, bed: Path, scores: Path, out: Path, *more: str) -> list[str]:
    base = ["--model_path", str(folder), "--importance_scores_file", str(scores), "--datasets", "text_vqa"]
    base += ["--output_dir", str(out), "--num_samples", "2", "--batch_size", "2", "--data_dir", str(bed)]
    return [*base, "--latency_samples", "1", "--repeats", "1", "--max_new_tokens", "2", "--device", "cpu", *more]


@pytest.mark.usefixtures("no_ink")
def test_every_setting_has_a_row(
    tiny_folder: Path, small_bed: Path, scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempovlm.lab.core_exp.sweep.warm_up", lambda *_: None)
    main, out = script(SCRIPT).main, tmp_path / "out"
    main(words(tiny_folder, small_bed, scores, out))
    records = json.loads((out / "text_vqa" / "profiling_results.json").read_text())
    assert len(records) == len(tiny_model.SPACE)
    for record in records:
        assert set(record) >= PREDECESSOR
        assert record["num_samples"] == 2
        assert (record["num_latency_samples"], record["num_latency_repeats"]) == (1, 1)
        assert record["data_source"] == "synthetic"
        low, high = record["accuracy_interval"]
        assert 0 <= low <= record["accuracy"] <= high <= 1
        assert 0 < record["T_total_p50"] <= record["T_total_p95"] <= record["T_total_p99"]
        # The better blocks are the later ones here, and both ends always run.
        inner = record["num_blocks"] - 2
        assert record["selected_blocks"] == [0, *range(5 - inner, 5), 5]
    for name in ("frontier.png", "stages.png"):
        assert (out / "text_vqa" / name).read_bytes().startswith(b"\x89PNG")
    again = tmp_path / "again"
    main(words(tiny_folder, small_bed, scores, again, "--results_dir", str(out / "core_exp")))
    assert json.loads((again / "text_vqa" / "profiling_results.json").read_text()) == records
    scores.write_text(json.dumps({str(block): -0.1 * block for block in range(6)}))
    with pytest.raises(UserError, match="field ranking is not that of"):
        main(words(tiny_folder, small_bed, scores, again, "--results_dir", str(out / "core_exp")))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--importance_scores_file", "absent.json"], "absent.json: missing; give a JSON list of blocks"),
        (["--results_dir", "absent"], "absent: no such results directory"),
        (["--datasets", "imagenet"], "--datasets imagenet: unknown data set"),
        (["--latency_samples", "0"], "--latency_samples 0: must be at least 1"),
    ],
)
def test_bad_flags_are_named(
    more: list[str], named: str, tiny_folder: Path, small_bed: Path, scores: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        script(SCRIPT).main(words(tiny_folder, small_bed, scores, tmp_path / "out", *more))
    assert named in str(caught.value)


STAMP = Stamp(
    **dict.fromkeys(("hardware", "device", "os", "python", "torch", "tempovlm", "commit", "model"), "x"),
    threads=2,
    weights="w",
    knob_space=tiny_model.SPACE.fingerprint,
    data_source="synthetic",
    created="2026",
)


def row(question: int, image: int, accuracy: float, times_ms: tuple[float, ...] = ()) -> SweepRow:
    """A row with the given totals, all of it prefill; untimed without any."""
    knobs = tiny_model.SPACE.native
    middle = sorted(times_ms)[len(times_ms) // 2] if times_ms else None
    zero = None if middle is None else 0.0
    fields = ("T_preprocess", "T_vision_encoder", "T_projector", "T_LLM_decode")
    return SweepRow(
        dataset="text_vqa",
        split="val",
        question_id=f"q{question}",
        image_id=f"i{image}",
        template="",
        tier=knobs.tier,
        top_k=knobs.top_k,
        num_blocks=knobs.num_blocks,
        vision_tokens=10,
        text_tokens=5,
        output_tokens=1,
        accuracy=accuracy,
        prediction="x",
        T_LLM_prefill=middle,
        T_total=middle,
        **dict.fromkeys(fields, zero),
        repeats={
            **{name: (0.0,) * len(times_ms) for name in (*fields, "T_control")},
            "T_LLM_prefill": times_ms,
            "T_total": times_ms,
        }
        if times_ms
        else None,
        step_ms=((),) * len(times_ms) if times_ms else None,
    )


def table(folder: Path, rows: list[SweepRow], stamp: Stamp = STAMP) -> Path:
    store.write_rows(folder, "text_vqa", rows, stamp)
    return folder


def test_a_summary_by_hand(tmp_path: Path) -> None:
    from tempovlm.core.plan import Ranking

    rows = [row(0, 0, 1.0, (10.0, 20.0, 30.0)), row(1, 0, 1.0), row(2, 1, 0.0, (40.0, 50.0, 60.0)), row(3, 2, 0.0)]
    rows.append(replace(row(4, 3, 0.0), accuracy=None, prediction=None, error="OSError: gone"))
    frame = store.read_results([table(tmp_path, rows)])
    (record,) = summarise(frame, "text_vqa", "val", Ranking.evenly_spaced(6))
    assert (record["num_samples"], record["num_images"], record["num_failed"]) == (4, 3, 1)
    assert record["accuracy"] == pytest.approx(0.5)
    assert (record["T_total"], record["T_total_p50"], record["num_latency_repeats"]) == pytest.approx(
        (35.0, 35.0, 6)
    )
    assert record["T_total_p95"] == pytest.approx(np.quantile([10, 20, 30, 40, 50, 60], 0.95))
    assert record["T_decode_per_token"] is None
    assert record["T_vision_total"] == pytest.approx(0.0)
    # Cluster sums of residuals 1, -0.5, -0.5: sqrt(3/2 · 1.5) / 4.
    assert record["accuracy_se"] == pytest.approx(0.375)
    with pytest.raises(UserError, match=r"text_vqa \(train\) has no row with field accuracy"):
        summarise(frame, "text_vqa", "train", Ranking.evenly_spaced(6))


def test_machines_and_models_are_not_mixed(tmp_path: Path) -> None:
    from tempovlm.core.plan import Ranking

    ranking = Ranking.evenly_spaced(6)
    timed = table(tmp_path / "timed", [row(0, 0, 1.0, (10.0,))])
    scored = table(tmp_path / "scored", [row(0, 0, 1.0), row(1, 1, 0.0)], replace(STAMP, hardware="y"))
    (record,) = summarise(store.read_results([scored, timed]), "text_vqa", "val", ranking)
    assert (record["num_samples"], record["num_latency_samples"], record["stamp"]["hardware"]) == (2, 1, "x")
    with pytest.raises(UserError, match="has no row with field T_total"):
        summarise(store.read_results([scored]), "text_vqa", "val", ranking)
    other = table(tmp_path / "other", [row(0, 0, 1.0, (10.0,))], replace(STAMP, hardware="y"))
    with pytest.raises(UserError, match="field hardware of their stamps differs"):
        summarise(store.read_results([timed, other]), "text_vqa", "val", ranking)
    table(other, [row(0, 0, 1.0)], replace(STAMP, weights="v"))
    with pytest.raises(UserError, match="field weights of their stamps differs"):
        summarise(store.read_results([timed, other]), "text_vqa", "val", ranking)


def test_the_frontier_rises() -> None:
    points = [(10.0, 0.5), (20.0, 0.4), (30.0, 0.7), (30.0, 0.6), (40.0, 0.7), (None, 0.9)]
    best = frontier({"T_total_p50": total_ms, "accuracy": accuracy} for total_ms, accuracy in points)
    assert [(one["T_total_p50"], one["accuracy"]) for one in best] == [
        pytest.approx((10.0, 0.5)),
        pytest.approx((30.0, 0.7)),
    ]


def test_a_mean_without_clusters_to_compare() -> None:
    assert clustered_mean(np.array([]), np.array([])) == (None, None)
    assert clustered_mean(np.array([1.0, 0.0]), np.array(["a", "a"])) == (pytest.approx(0.5), None)
    mean, error = clustered_mean(np.array([1.0, 0.0, 1.0, 0.0]), np.arange(4))
    assert (mean, error) == (pytest.approx(0.5), pytest.approx(np.std([1, 0, 1, 0], ddof=1) / 2))
