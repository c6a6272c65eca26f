"""`tempovlm tune`, what goes by its result, and what `tempovlm calibrate` says of budgets."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import tiny_model
from tempovlm.api import TempoVLM, load
from tempovlm.cli import bench, calibrate, tune
from tempovlm.cli import main as cli
from tempovlm.core.errors import UserError
from tempovlm.core.files import writing_to
from tempovlm.core.knobs import KnobSpace
from tempovlm.core.request import Request
from tempovlm.data import registry
from tempovlm.engine import calibration
from tempovlm.lab import tune as lab
from timings import Ticks

CONFIG = replace(tiny_model.CONFIG, num_blocks=4, num_experts=4, top_k=2)
SPACE = KnobSpace.for_model(CONFIG.shape)
PROFILE = tiny_model.make_profile(SPACE)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 27 settings: every question is answered at each."""
    return tiny_model.save_folder(tmp_path_factory.mktemp("model") / "tiny", CONFIG)


@pytest.fixture(autouse=True)
def _any_machine(ticks: Ticks, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    del ticks
    monkeypatch.setenv("TEMPOVLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("tempovlm.lab.drawing.can_draw", lambda: False)
    monkeypatch.setattr(calibration, "measure", lambda *_, **__: PROFILE.measurements)
    registry._own.clear()
    yield
    registry._own.clear()


@pytest.fixture
def signs(tmp_path: Path) -> Path:
    """Fourteen questions about as many pictures."""
    rows = ["id,image,question,answer"]
    for number in range(14):
        Image.fromarray(tiny_model.picture(number)).save(tmp_path / f"{number}.png")
        rows.append(f"q{number},{number}.png,what does the sign say?,{'stop' if number % 2 else 'dog'}")
    path = tmp_path / "signs.csv"
    path.write_text("\n".join(rows))
    return path


def flags(model: Path, *more: str) -> list[str]:
    return ["--model", str(model), "--device", "cpu", "--max_new_tokens", "2", *more]


def run(signs: Path, model: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    tune.main([str(signs), *flags(model, "--json", *more)])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def quick(model: Path, policy: str) -> TempoVLM:
    return load(str(model), device="cpu", policy=policy, warmup=False, progress=False)


def test_tune_stores_a_whole_table_that_policies_go_by(
    signs: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], picture: Image.Image
) -> None:
    record = run(signs, tiny_folder, capsys)
    assert len(record["settings"]) == len(SPACE)
    assert record["num_questions"] == 14
    assert any(row["frontier"] for row in record["settings"])
    assert {row["budget_ms"] for row in record["budgets"]}
    stored = json.loads(Path(record["path"]).read_text())
    assert stored["settings"] == record["settings"]
    for policy in ("table:signs", f"table:{signs}", f"table:{record['path']}"):
        assert quick(tiny_folder, policy).answer(picture, "what?", budget_ms=1e5).policy == "table:signs"


def test_bench_goes_by_it_on_the_same_file(
    signs: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(signs, tiny_folder, capsys)
    words = [str(signs), *flags(tiny_folder), "--budgets", "60", "--num_samples", "2", "--fixed", "none"]
    for more, policy in (([], "table:signs"), (["--policy", "table"], "table (assumed)")):
        bench.main([*words, *more, "--output_dir", str(tmp_path / "out")])
        assert json.loads((tmp_path / "out" / "bench.json").read_text())["chosen_by"] == [policy]
    assert "accuracies are assumed" not in capsys.readouterr().out


def test_what_was_answered_before_an_interruption_is_not_asked_again(
    signs: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    whole = lab.run_accuracy

    def until(*args: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(len(args[1]))
        whole(*args)

    monkeypatch.setattr(lab, "run_accuracy", until)
    with pytest.raises(KeyboardInterrupt):
        run(signs, tiny_folder, capsys)
    monkeypatch.setattr(lab, "run_accuracy", lambda *args: (asked.append(len(args[1])), whole(*args)))
    first = run(signs, tiny_folder, capsys)
    before = list(asked)
    again = run(signs, tiny_folder, capsys)
    assert before[1] == 0  # the first batch again, of which nothing is left to ask
    assert not any(asked[len(before) :])
    assert again["settings"] == first["settings"]


def test_wrong_input_is_one_line(signs: Path, tiny_folder: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.csv"
    few.write_text("\n".join(signs.read_text().splitlines()[:4]))
    for words, told in (
        (["text_vqa"], "text_vqa: give a file of your own questions"),
        ([str(few)], f"{few}: has 3 questions of split val; give at least 12"),
        ([str(signs), "--num_samples", "3"], "--num_samples 3: must be at least 12"),
    ):
        with pytest.raises(UserError, match="^" + told.replace(".", r"\.")):
            tune.main([*words, *flags(tiny_folder)])
    assert cli.main(["tune", str(tmp_path / "none.csv"), *flags(tiny_folder)]) == 2


def test_a_cache_in_use_or_out_of_reach_is_told(
    signs: Path,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(signs, tiny_folder, capsys)
    (folder,) = (tmp_path / "cache").rglob("*.answers/*/")
    with writing_to(folder), pytest.raises(UserError, match=r"the cache \(TEMPOVLM_CACHE_DIR\).* another process"):
        run(signs, tiny_folder, capsys)
    (tmp_path / "file").touch()
    monkeypatch.setenv("TEMPOVLM_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tempovlm.api.load", lambda *_, **__: pytest.fail("loaded before the cache was looked at"))
    with pytest.raises(UserError, match=r"the cache \(TEMPOVLM_CACHE_DIR\).*: cannot be made"):
        run(signs, tiny_folder, capsys)


def test_tables_that_do_not_fit_are_told(
    signs: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"policy='table:signs': .*run tempovlm tune signs\.csv$"):
        quick(tiny_folder, "table:signs")
    record = run(signs, tiny_folder, capsys)
    low: dict[str, Any] = {"space": {"tier": ["low"]}, "warmup": False, "progress": False}
    assert load(str(tiny_folder), device="cpu", policy="table:signs", **low).space.tiers == ("low",)
    with pytest.raises(UserError, match=r"field ranking is another one: its accuracies do not hold"):
        load(str(tiny_folder), device="cpu", policy="table:signs", ranking=[2, 1], **low)
    signs.write_text(signs.read_text().replace("sign say", "sign read"))
    with pytest.raises(UserError, match="has changed since it was tuned"):
        quick(tiny_folder, f"table:{signs}")
    with pytest.raises(UserError, match=r"or choose from signs$"):
        quick(tiny_folder, "table:shops")
    path = Path(record["path"])
    for name, value in (("weights", "0" * 12), ("settings", [{}]), ("ranking", [3, 0, 1, 2])):
        broken = Path(shutil.copy(path, tmp_path / "broken.json"))
        broken.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
        with pytest.raises(UserError, match=r"broken\.json: (field|damaged)"):
            quick(tiny_folder, f"table:{broken}")


def test_assumed_accuracies_are_told_once(
    tiny_folder: Path, picture: Image.Image, caplog: pytest.LogCaptureFixture
) -> None:
    model = quick(tiny_folder, "auto")
    with caplog.at_level(logging.WARNING, "tempovlm"):
        answers = [model.answer(picture, "what?", budget_ms=1e5) for _ in range(2)]
    assert [one.to_json()["policy"] for one in answers] == ["table (assumed)"] * 2
    assert caplog.text.count("accuracies are assumed, not measured") == 1


def test_calibrate_ends_with_budgets(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--model", str(tiny_folder), "--device", "cpu"]
    calibrate.main([*words, "--json", "--max_new_tokens", "4"])
    record = json.loads(capsys.readouterr().out)
    bounds_ms = [row["upper_ms"] for row in record["settings"]]
    assert record["feasible_from_ms"] == pytest.approx(min(bounds_ms))
    assert record["everything_fits_from_ms"] == pytest.approx(max(bounds_ms))
    budgets_ms = [row["budget_ms"] for row in record["budgets"]]
    assert budgets_ms[-2] < max(bounds_ms) <= budgets_ms[-1]
    assert not record["accuracy_measured"]
    expected = [row["accuracy"] for row in record["budgets"]]
    assert expected == sorted(expected)
    seen: list[Any] = []
    monkeypatch.setattr(
        calibration, "measure", lambda *_, **given: seen.append(given["pictures"]) or PROFILE.measurements
    )
    Image.fromarray(tiny_model.picture()).save(tmp_path / "mine.png")
    calibrate.main([*words, "--images", str(tmp_path)])
    assert seen == [[tmp_path / "mine.png"]]
    out = capsys.readouterr().out
    assert "feasible from" in out
    assert "assumed, not measured" in out
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no pictures"):
        calibrate.main([*words, "--images", str(tmp_path / "empty")])


def test_the_bounds_that_are_printed_decide(tiny_folder: Path) -> None:
    model = quick(tiny_folder, "table")
    model.calibrate()
    guard = model.guard_for(calibrate.any_request(16))
    least_ms, profile = float(guard.budgets_ms().min()), guard.profile
    assert profile is not None
    for budget_ms, feasible in ((least_ms * 0.99, False), (least_ms * 1.01, True)):
        request = Request(images=(), question="what?", budget_ms=budget_ms)
        assert guard.choose_tier(request, None, profile.open_ms).feasible is feasible


@pytest.mark.parametrize(("least_ms", "most_ms"), [(129.0, 1060.0), (3.5, 5.0), (0.4, 90_000.0)])
def test_round_budgets(least_ms: float, most_ms: float) -> None:
    found = calibrate.round_budgets_ms(least_ms, most_ms)
    assert 1 <= len(found) <= 8
    assert found == sorted(found)
    assert found[0] >= least_ms
    assert found[-1] >= most_ms
