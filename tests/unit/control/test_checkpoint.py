"""Controller files: what comes back is what went in, and what does not belong is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny_model
from tempovlm.control.checkpoint import PARTS, load_controller, read_tensors, save_controller, write_tensors
from tempovlm.control.learned.networks import (
    Knob1PredictorBudgetLanguage,
    Knob2Knob3Predictor,
    SupervisedController,
)
from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobSpace
from tempovlm.model.config import POCKET

SPACE = tiny_model.SPACE
OTHER = KnobSpace.for_model(POCKET.shape)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "new" / "controller.pt"
    second = Knob2Knob3Predictor(4, 6, 8, len(SPACE.top_ks), len(SPACE.block_counts))
    nets = {"knob1": Knob1PredictorBudgetLanguage(6, 8), "knob2knob3": second}
    save_controller(
        path,
        kind="two_stage",
        networks=nets,
        space=SPACE,
        weights_hash="abc",
        stamp={"hardware": "a machine"},
        options={"lr": 1e-4, "folder": Path("x")},
        metrics={"accuracy": 0.5},
    )
    return path


def edit(path: Path, **values: object) -> None:
    write_tensors(path, read_tensors(path, "file") | values)


def test_both_stages_come_back(path: Path) -> None:
    saved = load_controller(path, SPACE, "abc")
    assert saved.kind == "two_stage"
    assert (saved.weights_hash, saved.options, saved.metrics) == (
        "abc",
        {"lr": pytest.approx(1e-4), "folder": "x"},
        pytest.approx({"accuracy": 0.5}),
    )
    assert set(saved.networks) == set(PARTS["two_stage"])
    first = saved.networks["knob1"]
    assert not first.training
    state = read_tensors(path, "file")["networks"]["knob1"]["state"]
    assert torch.equal(first.state_dict()["trunk.1.weight"], state["trunk.1.weight"])
    assert [entry.name for entry in path.parent.iterdir()] == ["controller.pt"]


def test_nothing_but_tensors_and_plain_values(path: Path) -> None:
    assert torch.load(path, weights_only=True)["kind"] == "two_stage"


def test_another_knob_space_or_model(path: Path) -> None:
    with pytest.raises(UserError, match=r"controller\.pt: field knob_space is .* allow those alone \(--tiers"):
        load_controller(path, OTHER)
    with pytest.raises(UserError, match=r"controller\.pt: field weights is abc"):
        load_controller(path, SPACE, "def")
    assert load_controller(path, SPACE).weights_hash == "abc"


def test_missing_cut_off_or_foreign(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.pt: no such file"):
        load_controller(tmp_path / "absent.pt", SPACE)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"controller\.pt: damaged"):
        load_controller(path, SPACE)
    path.write_bytes(b"\x80\x02s.")  # a pickle that takes from an empty stack
    with pytest.raises(UserError, match=r"controller\.pt: damaged"):
        load_controller(path, SPACE)
    torch.save({"schema": "else"}, path)
    with pytest.raises(UserError, match=r"controller\.pt: field schema"):
        load_controller(path, SPACE)
    torch.save([1], path)
    with pytest.raises(UserError, match=r"controller\.pt: no controller checkpoint, but a list"):
        load_controller(path, SPACE)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "magic"}, "field kind is 'magic'"),
        ({"networks": {"knob1": {"class": "Popen", "sizes": {}, "state": {}}}}, "field networks cannot be used"),
        ({"networks": {}}, "field networks cannot be used"),
    ],
)
def test_a_wrong_field_is_named(path: Path, values: dict[str, object], message: str) -> None:
    edit(path, **values)
    with pytest.raises(UserError) as caught:
        load_controller(path, SPACE)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    torch.save(Path, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"evil\.pt: damaged, or no controller checkpoint"):
        load_controller(tmp_path / "evil.pt", SPACE)


def test_a_kind_has_its_networks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind two_stage has the networks"):
        save_controller(
            tmp_path / "x.pt", kind="two_stage", networks={"controller": SupervisedController(8)}, space=SPACE
        )
