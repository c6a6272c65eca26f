"""What a stream says, joined, is the answer's text: for words, for bytes, for stop texts, for every end."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from molmoe_files import FILES, published
from tempovlm.core.request import FinishReason, Request
from tempovlm.engine.transcript import Token, Transcript
from tempovlm.model.prompt import CONTROL_TOKENS, Tokenizer

ROOT = Path(__file__).resolve().parents[3]


def byte_level(merges: Sequence[tuple[str, str]] = ()) -> Tokenizer:
    """A tokenizer of MolmoE's kind that spells in single bytes, but for a few merges."""
    entries = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    fast = FastTokenizer(models.BPE({entry: i for i, entry in enumerate(entries)}, list(merges)))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(name, special=True) for name in CONTROL_TOKENS])
    return Tokenizer(fast)


@pytest.fixture(scope="module", params=["bytes", "pocket", pytest.param("published", marks=published)])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "bytes":
        return byte_level([("b", "l"), ("Ġ", "b")])
    if request.param == "pocket":
        return Tokenizer.load(ROOT / "src" / "tempovlm" / "pocket" / "tokenizer.json")
    assert FILES is not None
    return Tokenizer.load(FILES / "tokenizer.json")


def request(stop: Sequence[str] = (), max_new_tokens: int = 400) -> Request:
    return Request(images=(), question="q", stop=tuple(stop), max_new_tokens=max_new_tokens)


def steps(transcript: Transcript, tokens: Sequence[int]) -> Iterator[list[Token]]:
    """What each of the tokens lets out, while the answer is not over."""
    for token in tokens:
        if transcript.finish:
            return
        yield transcript.add(token)


def told(
    tokenizer: Tokenizer, text: str, stop: Sequence[str] = (), end: FinishReason = "stop"
) -> tuple[str, Transcript]:
    """The stream of a text, joined, and its transcript."""
    transcript = Transcript(request(stop), tokenizer)
    said = list(itertools.chain.from_iterable(steps(transcript, tokenizer.encode(text))))
    if not transcript.finish and end == "stop":
        said += transcript.add(tokenizer.end)
    elif not transcript.finish:
        transcript.end(end)
    said += transcript.settled()
    assert [token.index for token in said] == list(range(len(said)))
    assert [token.id for token in said] == [token for token in transcript.tokens if token != tokenizer.end]
    return "".join(token.text for token in said), transcript


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("the blue bus", ["blue bus"], "the"),
        ("the blue bus is red", ["s is", "blue bus"], "the"),
        ("the blue buffet", ["blue bus"], "the blue buffet"),
        ("the blue", ["blue bus"], "the blue"),
        ("aab aac", ["aac"], "aab"),
        ("blue bus", ["the", "blue"], ""),
        ("one two three", [" three", "two three four"], "one two"),
    ],
)
@pytest.mark.parametrize("end", ["stop", "cancelled", "deadline"])
def test_a_stop_text_that_began_in_what_was_said(
    tokenizer: Tokenizer, text: str, stop: list[str], expected: str, end: FinishReason
) -> None:
    joined, transcript = told(tokenizer, text, stop, end)
    assert joined == transcript.text == expected
    is_stopped = any(one in text for one in stop)
    assert transcript.finish == ("stop" if is_stopped else end)


@pytest.mark.parametrize("text", ["café", "5€", "a 😀 b", "naïve 東京 👩‍👩‍👧", "é"])
@pytest.mark.parametrize("stop", [(), ("b",), ("€",), ("é 5",)])
def test_characters_of_several_bytes_come_whole(text: str, stop: Sequence[str]) -> None:
    tokenizer = byte_level()
    assert len(tokenizer.encode(text)) == len(text.encode())
    joined, transcript = told(tokenizer, text, stop)
    cut = min((text.index(one) for one in stop if one in text), default=len(text))
    assert joined == transcript.text == text[:cut].strip()


@pytest.mark.parametrize("end", ["length", "cancelled"])
def test_half_a_character_is_said_at_the_very_end_only(end: FinishReason) -> None:
    tokenizer = byte_level()
    tokens = tokenizer.encode("5€")[:-1]
    transcript = Transcript(request(max_new_tokens=len(tokens) if end == "length" else 9), tokenizer)
    early, late = list(steps(transcript, tokens[:-1])), transcript.add(tokens[-1])
    transcript.end(end)
    late += transcript.settled()
    assert [token.text for part in early for token in part] == ["5"]
    assert "".join(token.text for token in late) == "\ufffd"
    assert (transcript.text, transcript.finish) == ("5\ufffd", end)


def test_a_character_that_never_ends_is_said_once_it_is_sure() -> None:
    tokenizer = byte_level()
    tokens = [*tokenizer.encode("5€")[:-1], *tokenizer.encode("a")]
    transcript = Transcript(request(), tokenizer)
    said = ["".join(token.text for token in part) for part in steps(transcript, tokens)]
    assert said == ["5", "", "", "\ufffda"]


@pytest.mark.parametrize(
    ("text", "stop", "expected", "used"),
    [
        ("red\nblue", "\n", "red", 4),
        ("red\n\n\n", "\n", "red", 4),
        ("red\n\n\n", "\n\n", "red", 5),
        ("\n \nred \n", "\n", "red", 8),
        ("red blue ", " ", "red", 4),
        ("red. ", ". ", "red", 5),
    ],
)
def test_line_ends_and_spaces_stop_as_soon_as_they_come(text: str, stop: str, expected: str, used: int) -> None:
    joined, transcript = told(byte_level(), text, [stop])
    assert joined == transcript.text == expected
    assert (transcript.finish, len(transcript.tokens)) == ("stop", used)


@pytest.mark.parametrize("text", ["  red", " red \n", "\n\n", "red  blue\n \n", "\u3000red\u3000"])
@pytest.mark.parametrize("end", ["stop", "length", "deadline", "cancelled"])
def test_outer_white_space_is_never_said(text: str, end: FinishReason) -> None:
    joined, transcript = told(byte_level(), text, end=end)
    assert joined == transcript.text == text.strip()


@pytest.mark.parametrize("stop", [[], ["ue b"], ["the blue bus is "], ["r", " is red"]])
def test_cut_anywhere_the_stream_is_the_answer(tokenizer: Tokenizer, stop: list[str]) -> None:
    tokens = tokenizer.encode("the blue bus is red 5 is best")
    for most in range(1, len(tokens) + 1):
        transcript = Transcript(request(stop, most), tokenizer)
        said = list(itertools.chain.from_iterable(steps(transcript, tokens)))
        assert "".join(token.text for token in said) == transcript.text
        assert [token.id for token in said] == transcript.tokens
        assert transcript.finish


def test_what_is_sure_is_not_held_back(tokenizer: Tokenizer) -> None:
    text = "the blue bus is red"
    transcript = Transcript(request(["zebra"]), tokenizer)
    tokens = tokenizer.encode(text)
    said = ["".join(token.text for token in part) for part in steps(transcript, tokens)]
    assert "".join(said) == text == transcript.text
    assert [len(tokenizer.decode(tokens[: i + 1]).rstrip()) for i in range(len(tokens))] == list(
        itertools.accumulate(map(len, said))
    )
