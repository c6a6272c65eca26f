"""`tempovlm reproduce`: the whole chain on a tiny model, what is skipped, what is refused, and the table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from experiments import recipes, reproduce
from experiments.recipes import ANSWERS, ESTIMATOR, Run, Setup, chain
from experiments.reproduce import JOURNAL, Journal

import stamps
import sweep_rows
import tiny_model
from tempovlm.cli import console
from tempovlm.cli.main import main
from tempovlm.core.errors import UserError
from tempovlm.core.records import SweepRow
from tempovlm.data.catalog import load_samples
from tempovlm.data.digest import question_digests
from tempovlm.data.registry import GENERATED
from tempovlm.data.sample import Sample
from tempovlm.engine import calibration
from tempovlm.lab.core_exp.questions import MANIFEST, keep_questions
from tempovlm.lab.core_exp.reuse import missing, take_results
from tempovlm.lab.core_exp.store import read_rows, write_rows
from tempovlm.model.weights import weights_hash
from tempovlm.testbed.make import make_testbed

ROOT = Path(__file__).resolve().parents[3]
SPACE = tiny_model.SPACE


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_testbed(tmp_path_factory.mktemp("beds") / "bed", 2, 2, seed=0, progress=False)


@pytest.fixture(scope="module")
def checkout(tiny_folder: Path, bed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the scripts, and made-up accuracies of the tiny model."""
    root = tmp_path_factory.mktemp("checkout")
    (root / "experiments").symlink_to(ROOT / "experiments")
    stamp = replace(stamps.STAMP, weights=weights_hash(tiny_folder), hardware="a GPU", device="cuda/bfloat16")
    for part, name in ANSWERS.items():
        split = "train" if part == "train" else "val"
        for dataset in GENERATED:
            samples = load_samples(dataset, split, data_dir=bed)
            rows = [answered(s) for s in samples]
            write_rows(root / name, dataset, [row for some in rows for row in some], stamp)
    return root


def answered(sample: Sample) -> list[SweepRow]:
    """A question's row at every setting; larger settings are right more often."""
    cut = sum(map(ord, str(sample.question_id))) % len(SPACE)
    return [sweep_rows.answered(sample, knobs, float(i >= cut), tiling=(2, 2)) for i, knobs in enumerate(SPACE)]


def words(folder: Path, bed: Path, checkout: Path, out: Path) -> list[str]:
    flags = {"model": folder, "device": "cpu", "data_dir": bed, "repository": checkout, "output_dir": out}
    pairs = [(f"--{name}", str(value)) for name, value in flags.items()]
    return ["reproduce", "--smoke", *(word for pair in pairs for word in pair)]


@pytest.fixture
def argv(tiny_folder: Path, bed: Path, checkout: Path, tmp_path: Path) -> list[str]:
    """The words of a run that writes to `run`."""
    return words(tiny_folder, bed, checkout, tmp_path / "run")


@pytest.mark.usefixtures("no_ink", "no_figures")
def test_the_whole_chain(
    tiny_folder: Path,
    bed: Path,
    checkout: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The one long test: every script runs on what the ones before it left."""
    monkeypatch.setenv("TEMPOVLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "measure", lambda *_, **__: tiny_model.make_profile().measurements)
    monkeypatch.setattr("tempovlm.lab.exp1_estimator.baselines.TREES", 5)
    monkeypatch.setattr("tempovlm.lab.exp1_estimator.baselines.benchmark_ms", lambda *_: 0.1)
    monkeypatch.setattr("tempovlm.lab.core_exp.sweep.warm_up", lambda *_: None)
    out = tmp_path / "run"
    # Names of folders hold wherever the steps run.
    monkeypatch.chdir(tiny_folder.parent)
    argv = words(Path(tiny_folder.name), bed, checkout, out)
    assert main(argv) == 0, capsys.readouterr().err
    printed = capsys.readouterr()
    for text in ("Exp 1", "Exp 2", "Exp 3", "Exp 4", "Exp 5", "Exp 6", "Exp 7", "Exp 8", "> 80 %", "missed"):
        assert text in printed.out
    assert "[1/13] Exp 6, importance of blocks: 1 training" in printed.err
    rows = json.loads((out / "results_table.json").read_text())["targets"]
    measured = {row["experiment"] for row in rows if row["measured"] is not None}
    assert measured >= {f"Exp {number}" for number in range(1, 9)}
    assert (out / "results/evaluate/pocket_cpu/judge.html").read_text().startswith("<!")
    known = json.loads((out / JOURNAL).read_text())
    assert len(known["took_ms"]) == 13
    judged = json.loads((out / "results/evaluate/pocket_cpu/judge.json").read_text())
    assert judged["reference"]["name"] == "twin pick"
    assert (out / "logs" / "exp4.txt").read_text()
    # Nothing is left to do; a lost result is made again, with everything that rests on it.
    monkeypatch.setattr(reproduce, "run_one", lambda step, *_: pytest.fail(step.name))
    assert main(argv) == 0
    (out / "results/adaptive_inference/pocket_cpu.parquet").unlink()
    with pytest.raises(pytest.fail.Exception, match="exp8"):
        main(argv)


def setup(**more: object) -> Setup:
    given = {
        "model": "pocket",
        "weights": "w",
        "device": "cpu",
        "place": "cpu",
        "counts": recipes.SHIPPED,
        "data_dir": None,
        "has_shipped": True,
    }
    return Setup(**(given | more))  # type: ignore[arg-type]


def test_the_order_is_the_protocols_and_each_step_finds_its_files() -> None:
    runs = chain(setup())
    numbered = [step.name for step in runs if step.name.startswith("exp")]
    assert numbered == ["exp6", "exp7", "exp1", "exp2", "exp3", "exp4", "exp5", "exp8"]
    assert len({step.name for step in runs}) == len(runs)
    made: list[str] = []
    for run in runs:
        assert all(any(f"{name}/".startswith(f"{one}/") for name in made) for one in run.inputs), run.name
        made += run.outputs


def test_half_an_hour_on_two_cores() -> None:
    runs = chain(setup())
    assert sum(step.about_ms for step in runs) <= 27 * 60_000
    taken = [step.name for step in runs if step.command == recipes.TAKE]
    assert taken == ["core_train", "core_val", "core_twin"]
    anew = chain(setup(counts=recipes.ANEW, has_shipped=False))
    assert sum(step.about_ms for step in anew) <= 30 * 60_000
    assert not [step.name for step in anew if step.command == recipes.TAKE]
    assert [step.name for step in anew] == [step.name for step in runs]
    (twin,) = (step for step in anew if step.name == "core_twin")
    assert "--twins" in twin.flags


def test_the_scripts_take_these_flags() -> None:
    for chosen in (setup(), setup(counts=recipes.SMOKE, has_shipped=False, device="cuda", place="h100")):
        for step in chain(chosen):
            if step.command.endswith(".py"):
                path = ROOT / step.command
                parser = reproduce.command(step.command, ROOT).__globals__["flags"]()
                assert path.is_file()
                parser.parse_args(list(step.flags))


def fake(log: list[str], stop_at: str = "") -> Callable[[Run, Path, Path, Setup], None]:
    def run_one(step: Run, folder: Path, *_: object) -> None:
        if step.name == stop_at:
            raise KeyboardInterrupt
        log.append(step.name)
        for name in step.outputs:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")

    return run_one


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, log = setup(), list[str]()
    runs, notes = chain(chosen), console.stderr()
    names = [step.name for step in runs]

    def go(stop_at: str = "") -> list[str]:
        log.clear()
        monkeypatch.setattr(reproduce, "run_one", fake(log, stop_at))
        kept = Journal.open(tmp_path, chosen.conditions())
        reproduce.run_all(runs, kept, tmp_path, chosen, notes)
        return log

    with pytest.raises(KeyboardInterrupt):
        go(stop_at="exp3")
    assert log == names[: names.index("exp3")]
    assert go() == names[names.index("exp3") :]
    assert go() == []
    (tmp_path / ESTIMATOR).unlink()
    assert go() == names[names.index("exp1") :]
    with pytest.raises(UserError, match="holds a run with another weights, device"):
        Journal.open(tmp_path, setup(weights="v", device="cuda").conditions())
    (tmp_path / JOURNAL).write_text('{"conditions": ')
    with pytest.raises(UserError, match=f"{JOURNAL}: damaged"):
        go()


def test_a_step_that_leaves_nothing_is_no_step(tmp_path: Path) -> None:
    kept = Journal(tmp_path, {})
    (step, *_) = chain(setup())
    with pytest.raises(UserError, match=r"was not written; see logs/data\.txt"):
        kept.finish(step, 5.0)
    assert not kept.is_done(step)


def test_the_time_left_follows_the_pace(tmp_path: Path) -> None:
    one, two, three = (replace(chain(setup())[i], about_ms=100.0 * (i + 1)) for i in range(3))
    kept = Journal(tmp_path, {})
    assert kept.left_ms((one, two, three), (one, two, three)) == pytest.approx(600)
    kept.took_ms[one.name] = 200.0
    assert 500 < kept.left_ms((one, two, three), (two, three)) < 1000
    for run in (two, three):
        kept.took_ms[run.name] = 2 * run.about_ms
    assert kept.left_ms((one, two, three), (three,)) == pytest.approx(300 * (200 + 1200) / (200 + 600))


def test_a_first_short_step_does_not_decide_the_time_left(tmp_path: Path) -> None:
    """A step of seconds may take many times what was expected, such as for imports."""
    runs = chain(setup(counts=recipes.SMOKE, has_shipped=False))
    kept, before = Journal(tmp_path, {}), Journal(tmp_path, {}).left_ms(runs, runs)
    kept.took_ms[runs[0].name] = runs[0].about_ms + 5000
    assert kept.left_ms(runs, runs[1:]) == pytest.approx(before, rel=0.2)


def test_a_smoke_run_that_draws_its_pictures_answers_them_itself(
    argv: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shipped answers are about other pictures than the few that it draws."""
    asked: list[Setup] = []
    monkeypatch.setattr(reproduce, "run_all", lambda *given: asked.append(given[3]))
    monkeypatch.setattr(reproduce, "write_table", lambda _: [])
    assert main(argv) == 0
    place = argv.index("--data_dir")
    assert main([*argv[:place], *argv[place + 2 : -1], f"{argv[-1]}_drawn"]) == 0
    assert [one.has_shipped for one in asked] == [True, False]
    assert all(one.counts == recipes.SMOKE for one in asked)


def test_shipped_rows_are_taken_where_the_questions_are_here(
    bed: Path, checkout: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    source, hashed = checkout / ANSWERS["val"], weights_hash(tiny_folder)
    order = list(range(6))
    assert missing([source], GENERATED, hashed, SPACE.fingerprint, order) is None
    assert "of the weights" in str(missing([source], GENERATED, "w", SPACE.fingerprint, order))
    assert "is not there" in str(missing([tmp_path], GENERATED, hashed, SPACE.fingerprint, order))
    samples = load_samples("okvqa", "val", data_dir=bed)
    first, other, *_ = samples
    (source / MANIFEST).write_text(json.dumps({"ranking": [5, *order[:5]]}))
    assert "other blocks" in str(missing([source], GENERATED, hashed, SPACE.fingerprint, order))
    changed = replace(first, template="another kind")
    taken = take_results(source, tmp_path / "out", {"okvqa": [changed, other, *samples[2:]]}, 1)
    rows, stamp = read_rows(tmp_path / "out" / "okvqa.parquet")
    assert taken == {"okvqa": 1}
    assert {row.question_id for row in rows} == {str(other.question_id)}
    assert (len(rows), stamp.hardware) == (len(SPACE), "a GPU")
    assert (tmp_path / "out" / MANIFEST).is_file()
    (source / MANIFEST).unlink()
    with pytest.raises(UserError, match="about none of the 1 questions here"):
        take_results(source, tmp_path / "out", {"okvqa": [changed]}, 1)


@pytest.mark.parametrize(
    ("flag", "value", "named"),
    [
        ("--repository", "nowhere", "--repository nowhere: no folder experiments/controller there"),
        ("--data_dir", "nowhere", "--data_dir nowhere: no such folder"),
        ("--model", "nowhere", "--model nowhere: no such model"),
        ("--device", "tpu", "--device tpu: unknown"),
        ("--output_dir", "FILE", "cannot be made"),
        ("--output_dir", "/proc", "--output_dir /proc: cannot be written to"),
        ("--output_dir", "CHECKOUT", "is the repository itself"),
    ],
)
def test_wrong_input_is_one_line(
    flag: str,
    value: str,
    named: str,
    argv: list[str],
    checkout: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    places = {"FILE": str(tmp_path / "file"), "CHECKOUT": str(checkout)}
    argv[argv.index(flag) + 1] = places.get(value, value)
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert named in said
    assert said.count("\n") == 1


def test_two_runs_in_one_folder_are_not_mixed(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, begun = tmp_path / "run", list[str]()

    def second_while_first(step: Run, *_: object) -> None:
        begun.append(step.name)
        assert main([*argv[:-1], str(out / ".." / "run")]) == 2
        raise UserError("stopped")

    monkeypatch.setattr(reproduce, "run_one", second_while_first)
    assert main(argv) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(begun) == 1, "the second run has run nothing"
    assert "another process is writing results there; wait for it to end" in said[0]
    assert "stopped" in said[1]
    assert main(argv) == 2, "and what has ended holds nothing"
    assert len(begun) == 2


def test_a_run_goes_on_with_the_data_that_it_was_begun_with(bed: Path, tmp_path: Path) -> None:
    counts = recipes.SMOKE
    given = setup(data_dir=bed, questions=reproduce.data_digest(bed, counts))
    kept = Journal(tmp_path, given.conditions())
    kept.finish(replace(chain(given)[0], outputs=()), 1.0)
    other = shutil.copytree(bed, tmp_path / "other")
    assert reproduce.data_digest(other, counts) == given.questions
    path = other / "text_vqa" / "TextVQA_0.5.1_val.json"
    path.write_text(path.read_text().replace('"question": "', '"question": "so, '))
    changed = replace(given, questions=reproduce.data_digest(other, counts))
    with pytest.raises(UserError, match="holds a run with another questions"):
        Journal.open(tmp_path, changed.conditions())
    record = json.loads((tmp_path / JOURNAL).read_text())
    record["conditions"].pop("questions")
    (tmp_path / JOURNAL).write_text(json.dumps(record))
    assert Journal.open(tmp_path, given.conditions()).took_ms == kept.took_ms


def test_shipped_rows_of_other_pictures_are_refused(bed: Path, checkout: Path, tmp_path: Path) -> None:
    source = shutil.copytree(checkout / ANSWERS["val"], tmp_path / "source")
    samples = load_samples("okvqa", "val", data_dir=bed)
    (source / MANIFEST).write_text(json.dumps({"conditions": {"split": "val"}, "ranking": list(range(6))}))
    keep_questions(source, {}, {"okvqa": question_digests(samples)})
    assert take_results(source, tmp_path / "out", {"okvqa": samples}, 1) == {"okvqa": 1}
    others = [replace(sample, image_path=sample.twin_path) for sample in samples]
    with pytest.raises(UserError, match=r"source/sweep\.json: okvqa: the picture of question .* has changed"):
        take_results(source, tmp_path / "more", {"okvqa": others}, 1)
