from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripts import script

from tempovlm.core.errors import UserError
from tempovlm.core.files import writing_to
from tempovlm.core.plan import read_ranking
from tempovlm.testbed.bed import Bed

SCRIPT = "controller/validate_importance_consistency"


def words(model: Path | str, bed: Path, out: Path, *more: str) -> list[str]:
    names = ["text_vqa", "okvqa", "science_qa_img"]
    base = ["--model_path", str(model), "--dataset_names", *names, "--device", "cpu", "--data_dir", str(bed)]
    few = ["--num_samples", "2", "--num_joint_samples", "1", "--tier", "low", "--top_k", "4"]
    return [*base, *few, "--output_dir", str(out), "--merged_file", str(out / "second" / "merged.json"), *more]


def test_one_question_into_the_working_directory(
    tiny_folder: Path,
    small_bed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = words(tiny_folder, small_bed, tmp_path, "--dataset_names", "text_vqa", "--num_samples", "1")
    place = argv.index("--merged_file")
    script(SCRIPT).main([*argv[:place], *argv[place + 2 :], "--max_new_tokens", "2"])
    said = capsys.readouterr().out
    assert "undecided" in said
    assert said.endswith(f"{tmp_path / 'merged_scores.json'}\n")
    assert not (tmp_path / "results").exists()
    record = json.loads((tmp_path / "merged_scores.json").read_text())
    assert sorted(record["ranking"]) == list(range(6))
    assert len(record["joint_search"]) == 3
    assert record["stamp"]["model"] == "tiny"


def test_the_study_on_a_tiny_model(
    tiny_folder: Path, small_bed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, out = script(SCRIPT).main, tmp_path / "out"
    merged = out / "second" / "merged.json"
    argv = words(tiny_folder, small_bed, out, "--max_new_tokens", "4")
    main(argv)
    printed = capsys.readouterr().out
    assert "Data-agnostic among VQA data sets: " in printed
    record = json.loads(merged.read_text())
    assert record == json.loads((out / "merged_scores.json").read_text())
    assert sorted(record["ranking"]) == list(range(6))
    assert set(record["merged_scores"]) == {str(block) for block in range(6)}
    assert set(record["rankings"]) == {"joint", "single", "influence", "model", "even"}
    assert len(record["joint_search"]) == 3
    assert record["data_source"] == "synthetic"
    assert record["bed"] == Bed.read(small_bed).to_json()
    assert list(read_ranking(merged, 6).order) == record["ranking"]
    found = json.loads((out / "cross_dataset_correlation.json").read_text())
    assert set(found["pairwise"]) == {"text_vqa|okvqa", "text_vqa|science_qa_img", "okvqa|science_qa_img"}
    assert found["stamp"]["weights"] == record["stamp"]["weights"]
    for name in ("text_vqa", "okvqa", "science_qa_img"):
        one = json.loads((out / f"importance_comparison_{name}.json").read_text())
        assert len(one["train_scores"]) == len(one["validation_scores"]) == 6
        assert one["train"]["num_samples"] == 2
        assert (out / f"importance_comparison_{name}.png").read_bytes()[:4] == b"\x89PNG"
    before = {path: path.read_bytes() for path in (out / "scores").iterdir()}
    main(argv)
    assert {path: path.read_bytes() for path in (out / "scores").iterdir()} == before
    with pytest.raises(UserError, match="field max_new_tokens is of another run"):
        main(words(tiny_folder, small_bed, out, "--max_new_tokens", "5"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset_names", "vqa9"], "--dataset_names vqa9"),
        (["--num_samples", "0"], "--num_samples 0"),
        (["--tier", "huge"], "--tier huge"),
        (["--top_k", "7"], "--top_k 7"),
        (["--model_path", "nowhere"], "nowhere"),
        (["--num_val_samples", "0"], "--num_val_samples 0"),
        (["--output_dir", "/dev/null/x"], "--output_dir /dev/null/x: cannot be made"),
    ],
)
def test_wrong_flags_are_named(
    tiny_folder: Path, small_bed: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        script(SCRIPT).main(words(tiny_folder, small_bed, tmp_path, *flags))
    assert message in caught.value.flagged


def test_one_process_at_a_time(tiny_folder: Path, small_bed: Path, tmp_path: Path) -> None:
    with writing_to(tmp_path), pytest.raises(UserError, match="another process is writing results there"):
        script(SCRIPT).main(words(tiny_folder, small_bed, tmp_path))
