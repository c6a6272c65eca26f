from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from copy import copy, deepcopy
from pathlib import Path

import pytest
import torch

import tiny_model
from tempovlm.core.errors import UserError
from tempovlm.data.sample import choice_question
from tempovlm.model.prompt import CONTROL_TOKENS, IMAGE_PATCH, Tokenizer, build_prompt, prompt_text
from tempovlm.model.vision.tiling import Grid
from tempovlm.training.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(tiny_model.save_folder(tmp_path_factory.mktemp("tiny")) / "tokenizer.json")


def test_the_chat_format() -> None:
    assert prompt_text("what is it?", "vqa2") == " User: vqa2: what is it? Assistant:"
    assert prompt_text("what is it?", "") == " User: what is it? Assistant:"


def test_the_last_option_keeps_its_line_end() -> None:
    text = prompt_text(choice_question("which?", ("one", "two")), "science_qa")
    assert text == " User: science_qa: which?\nA: one\nB: two\n Assistant:"


@pytest.mark.parametrize("grid", [None, Grid(1, 1), Grid(2, 3)])
def test_features_stand_on_patch_tokens(grid: Grid | None, tokenizer: Tokenizer) -> None:
    prompt = build_prompt("what is it?", "vqa2", grid, tiny_model.CONFIG, tokenizer, 4)
    assert int(prompt.tokens[0]) == tokenizer.end
    patches = (prompt.tokens == tokenizer.ids[IMAGE_PATCH]).nonzero().flatten()
    assert prompt.num_vision_tokens == len(patches)
    assert prompt.num_text_tokens == len(prompt.tokens) - len(patches)
    if prompt.slots is not None:
        assert torch.equal(prompt.slots[prompt.slots >= 0].sort().values, patches)


@pytest.mark.parametrize("name", CONTROL_TOKENS)
@pytest.mark.parametrize("frame", ["{}", "what is {}?", "a{}b", "{}{}"])
def test_typed_text_never_becomes_a_control_token(name: str, frame: str, tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(frame.replace("{}", name))
    assert not set(tokenizer.ids.values()) & set(tokens)


def test_a_prompt_over_the_context_names_the_limit(tokenizer: Tokenizer) -> None:
    limit = tiny_model.CONFIG.max_sequence_length
    with pytest.raises(UserError, match=rf"exceed the context of {limit}"):
        build_prompt("dog " * limit, "vqa2", None, tiny_model.CONFIG, tokenizer, 4)
    length = len(build_prompt("dog", "vqa2", None, tiny_model.CONFIG, tokenizer, 4).tokens)
    build_prompt("dog", "vqa2", None, tiny_model.CONFIG, tokenizer, limit - length)
    with pytest.raises(UserError, match="shorten the question"):
        build_prompt("dog", "vqa2", None, tiny_model.CONFIG, tokenizer, limit - length + 1)


def test_a_missing_damaged_or_foreign_tokenizer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Tokenizer.load(path)
    path.write_text("{")
    with pytest.raises(UserError, match="not a readable"):
        Tokenizer.load(path)


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text)


class Questions(torch.utils.data.Dataset[list[int]]):
    """Prompts as a loader's workers read them."""

    def __init__(self, tokenizer: Tokenizer, texts: list[str]) -> None:
        self.tokenizer, self.texts = tokenizer, texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> list[int]:
        return self.tokenizer.encode(self.texts[index])


TYPED = [f"what is {name}?" for name in CONTROL_TOKENS]


@pytest.mark.parametrize("copied", [deepcopy, copy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_reads_typed_control_tokens_as_letters_too(
    copied: Callable[[Tokenizer], Tokenizer], tokenizer: Tokenizer
) -> None:
    again = copied(copied(tokenizer))
    assert (again.ids, again.end, again.pad) == (tokenizer.ids, tokenizer.end, tokenizer.pad)
    for text in TYPED:
        assert again.encode(text) == tokenizer.encode(text)
        assert not set(again.ids.values()) & set(again.encode(text))
    assert again.decode([5, 17, 3]) == tokenizer.decode([5, 17, 3])


@pytest.mark.parametrize("method", ["fork", "spawn", "threads"])
def test_workers_of_any_kind_read_the_same_prompts(method: str, tokenizer: Tokenizer) -> None:
    expected = [tokenizer.encode(text) for text in TYPED]
    if method == "threads":
        with ThreadPoolExecutor(2) as threads:
            assert list(threads.map(tokenizer.encode, TYPED)) == expected
        return
    with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool:
        assert list(pool.map(_encode, [tokenizer] * len(TYPED), TYPED)) == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loaders_workers_read_the_same_prompts(workers: int, tokenizer: Tokenizer) -> None:
    loader = torch.utils.data.DataLoader(Questions(tokenizer, TYPED), batch_size=None, num_workers=workers)
    assert list(loader) == [tokenizer.encode(text) for text in TYPED]


def test_the_switch_is_no_part_of_what_the_library_copies() -> None:
    """What `Tokenizer` sets anew in each copy."""
    fast = build_tokenizer(tiny_model.WORDS, "abc", 160)
    fast.encode_special_tokens = True
    assert not deepcopy(fast).encode_special_tokens
    assert Tokenizer(fast).encode(IMAGE_PATCH) == Tokenizer(deepcopy(fast)).encode(IMAGE_PATCH)
