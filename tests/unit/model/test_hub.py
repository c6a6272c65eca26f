"""Hub ids: told from paths, found in the hub's cache, and refused in one line where the hub cannot be reached."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tempovlm.api import load, model_folder
from tempovlm.core.errors import UserError
from tempovlm.model.files import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, which cannot be reached."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def put(cache: Path, repo_id: str, folder: Path) -> Path:
    """Lay a folder into the cache as if it had been downloaded."""
    repo = cache / ("models--" + repo_id.replace("/", "--"))
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder, repo / "snapshots" / COMMIT)
    return repo / "snapshots" / COMMIT


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("allenai/MolmoE-1B-0924", True),
        ("a/b.c_d", True),
        ("pocket", False),
        ("./a/b", False),
        ("/a/b", False),
        ("~/a", False),
        ("a/b/c", False),
        ("a/..", False),
        ("a b/c", False),
        ("", False),
    ],
)
def test_ids_are_told_from_paths(name: str, expected: bool) -> None:
    assert hub.is_hub_id(name) == expected


def test_a_cached_model_needs_no_network(hub_cache: Path, tiny_folder: Path) -> None:
    snapshot = put(hub_cache, "someone/tiny", tiny_folder)
    assert model_folder("someone/tiny") == snapshot
    model = load("someone/tiny", device="cpu", warmup=False, progress=False)
    assert model.engine.name == "tiny"


@pytest.mark.usefixtures("hub_cache")
def test_absent_and_offline_says_how_to_get_it() -> None:
    with pytest.raises(UserError) as error:
        model_folder("someone/absent")
    text = str(error.value)
    for part in ("model='someone/absent'", "HF_HUB_OFFLINE", "hf download someone/absent"):
        assert part in text
    assert "\n" not in text


def test_a_folder_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "someone" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert model_folder("someone/tiny") == Path("someone/tiny")


@pytest.mark.parametrize(
    ("name", "words"), [("GatedRepoError", "login"), ("RepositoryNotFoundError", "no such model")]
)
def test_what_the_hub_refuses(name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    kind = getattr(errors, name)

    def refuse(*_: object, **__: object) -> str:
        # Made without its constructor, which wants the response of a real request.
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=words):
        hub.fetch("someone/secret")


def test_pickled_weights_only_where_there_are_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[list[str]] = []

    def download(_: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub.fetch("a/b")
    assert [any("bin" in pattern for pattern in patterns) for patterns in asked] == [False, True]
    (tmp_path / "model.safetensors").write_bytes(b"")
    hub.fetch("a/b")
    assert len(asked) == 3
