"""The pocket's tokenizer: marks that people type leave the words beside them known; ids stay as trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, normalizers

from tempovlm.core.errors import UserError
from tempovlm.core.request import Request
from tempovlm.data.registry import DATASETS, GENERATED
from tempovlm.data.sample import choice_question
from tempovlm.model.prompt import CONTROL_TOKENS, Tokenizer, prompt_text
from tempovlm.model.weights import weights_hash
from tempovlm.testbed.generate import make_scene
from tempovlm.training.tokenizer import UNKNOWN, build_tokenizer

POCKET = Path(__file__).resolve().parents[3] / "src" / "tempovlm" / "pocket"


@pytest.fixture(scope="module")
def fast() -> FastTokenizer:
    return FastTokenizer.from_file(str(POCKET / "tokenizer.json"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(POCKET / "tokenizer.json")


@pytest.mark.parametrize(
    ("typed", "plain"),
    [
        ("\ufeffwhat does the sign say?", "what does the sign say?"),
        ("what does the \u201cred\u201d sign say?", "what does the red sign say?"),
        ("what does the \u2018red\u2019 sign say?", "what does the red sign say?"),
        ('what does the "red" (big) sign say!?', "what does the red big sign say?"),
        ("what\u2019s on the sign?", "what's on the sign?"),
        ("what\u200b\u00b4s on the sign?", "what's on the sign?"),
        ("what is\u00a0on\u2003the sign\uff1f", "what is on the sign?"),
        ("w\u00adhat is o\u200dn\u2060 the sign?\u202c", "what is on the sign?"),
        ("the sign\u2014what does it say\u2026", "the sign what does it say..."),
        ("the sign \u2013 what is on it?", "the sign what is on it?"),
        ("12\u201113\u221214", "12-13-14"),
        ("\uff57\uff48\uff41\uff54 \ufb01sh?", "what fish?"),
        ("the caf\u00e9, the cafe\u0301?", "the cafe, the cafe?"),
        ("what is this \U0001f436\ufe0f?", "what is this ?"),
        ("\u00bfwhat\u0000 is it\u2122?", "what is it?"),
    ],
)
def test_marks_leave_the_words_beside_them_known(tokenizer: Tokenizer, typed: str, plain: str) -> None:
    assert tokenizer.encode(typed) == tokenizer.encode(plain)
    assert tokenizer.encode(prompt_text(typed, "vqa2")) == tokenizer.encode(prompt_text(plain, "vqa2"))


def test_words_in_other_scripts_stay_unknown_words(tokenizer: Tokenizer, fast: FastTokenizer) -> None:
    unknown = fast.token_to_id(UNKNOWN)
    assert tokenizer.encode("what is \u6771\u4eac?")[2:] == [unknown]


def test_questions_of_the_test_bed_read_as_they_were_trained(tokenizer: Tokenizer) -> None:
    trained = FastTokenizer.from_file(str(POCKET / "tokenizer.json"))
    trained.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    trained.encode_special_tokens = True
    texts = set()
    for dataset in GENERATED:
        for split in ("train", "val"):
            for index in range(25):
                for item in make_scene(dataset, split, index).questions:
                    asked = choice_question(item.question, item.options) if item.options else item.question
                    texts |= {prompt_text(asked, DATASETS[dataset].style), item.answer, *item.options}
    assert len(texts) > 200
    for text in texts:
        assert tokenizer.encode(text) == trained.encode(text, add_special_tokens=False).ids


def test_ids_and_weights_are_those_that_results_were_measured_with(fast: FastTokenizer) -> None:
    card = json.loads((POCKET / "accuracy.json").read_text())
    assert weights_hash(POCKET) == card["weights"]
    vocabulary = fast.get_vocab(with_added_tokens=False)
    words = [word for word in vocabulary if not word.startswith("##") and word != UNKNOWN]
    built = build_tokenizer(words, [word for word in words if len(word) == 1], 1024)
    ours, anew = (json.loads(one.to_str()) for one in (fast, built))
    assert ours == anew
    assert [fast.token_to_id(name) for name in CONTROL_TOKENS] == list(range(len(vocabulary), len(vocabulary) + 6))


def test_no_answer_shows_how_words_are_spelled(fast: FastTokenizer, tokenizer: Tokenizer) -> None:
    inside = [i for word, i in fast.get_vocab().items() if word.startswith("##")]
    assert len(inside) > 20
    red = fast.token_to_id("red")
    for one in inside:
        for tokens in ([one], [one, red], [tokenizer.pad, one, one], [red, one]):
            assert "#" not in tokenizer.decode(tokens)
    zx = tokenizer.encode("zx81 red")
    assert tokenizer.decode(zx[1:]) == "x81 red"
    assert fast.decoder.decode(["##a", "##b", "red"]) == "ab red"
    assert decoders.WordPiece(cleanup=False).decode(["##a", "##b"]) == "##ab"  # what the second decoder is for


def test_a_mark_that_the_alphabet_has_stays() -> None:
    tokenizer = Tokenizer(build_tokenizer(["sign"], "signx()", 64))
    assert tokenizer.decode(tokenizer.encode("sign (x)")) == "sign (x)"
    assert tokenizer.decode(tokenizer.encode("sign [x]")) == "sign x"


@pytest.mark.parametrize("question", ["\ufeff", " \u200b\u00a0", "\x00\n", "\u3000\u2028\u00ad"])
def test_a_question_that_nobody_sees_is_empty(question: str) -> None:
    with pytest.raises(UserError, match="the question is empty"):
        Request(images=(), question=question)
