"""Metrics for open answers, each as the owners of its data set compute it.

Works on strings. Sources: VQA accuracy from VQAv2's
evaluation (github.com/GT-Vision-Lab/VQA, vqaEval.py); TextVQA accuracy from that challenge's
(github.com/facebookresearch/mmf, m4c_evaluators.py); ANLS from the Robust Reading Competition's script for
document questions (rrc.cvc.uab.es/?ch=17), after Biten et al., Scene Text Visual Question Answering, ICCV 2019
(arXiv 1905.13648); relaxed accuracy from Masry et al., ChartQA, Findings of ACL 2022 (arXiv 2203.10244).
`tests/golden/vqa_scores.json` holds scores that the first three programs gave.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_DROPPED = 32
"""The official program passes a flag to `re.sub` as the count, so that later periods stay."""
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_CONTRACTED = """
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've
mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's
there'd there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {"somebody'd": "somebodyd"} | {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTED.split() for i, mark in enumerate(word) if mark == "'"
}
"""Any one apostrophe forgotten. The first entry is the official list's own slip, kept so that scores agree."""
_ANLS_THRESHOLD = 0.5
_RELAXED_SHARE = 0.05


def normalise(answer: str) -> str:
    """Normalise an answer as the official evaluation does.

    Punctuation dropped or turned into blanks; periods kept only before digits; lower case; number words up to ten
    as digits; articles dropped; contractions given their apostrophe.
    """
    text = _one_line(answer)
    joined = bool(_COMMA_IN_NUMBER.search(text))
    cleaned = text
    for mark in _PUNCTUATION:
        if mark in text:
            beside_blank = f"{mark} " in text or f" {mark}" in text
            cleaned = cleaned.replace(mark, "" if beside_blank or joined else " ")
    cleaned = _PERIOD.sub("", cleaned, count=_PERIODS_DROPPED)
    words = [_NUMBERS.get(word, word) for word in cleaned.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the accuracy of VQAv2 and OK-VQA: the mean over all leave-one-out sets of min(1, matches / 3).

    If all people gave the same answer, the official program compares it unchanged, without normalisation.

    Args:
        prediction: The model's answer.
        answers: People's answers, usually ten.

    Returns:
        A number from 0 to 1; 0 without answers. A single answer counts in full: the official program,
        which leaves each out in turn and compares with the others, would give every reply 0.
    """
    said, given = _one_line(prediction), [_one_line(answer) for answer in answers]
    if len(set(given)) > 1:
        said, given = normalise(said), [normalise(answer) for answer in given]
    return _leave_one_out([answer == said for answer in given])


def text_vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the accuracy of TextVQA: as `vqa_accuracy`, but always normalised, with the possessive split off."""
    said = _normalise_text_vqa(prediction)
    return _leave_one_out([_normalise_text_vqa(answer) == said for answer in answers])


def _normalise_text_vqa(answer: str) -> str:
    plain = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalise(plain)


def _leave_one_out(matches: Sequence[bool]) -> float:
    if len(matches) < 2:
        return float(any(matches))
    total = sum(matches)
    return sum(min(1.0, (total - match) / 3) for match in matches) / len(matches)


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Return the normalised Levenshtein similarity of one question: the best over its answers, 0 if below 0.5.

    Case and repeated blanks do not count; as in the official script, the edit distance of the cleaned texts is
    divided by the longer length of the texts as given.
    """
    said = " ".join(prediction.lower().split())
    best = 0.0
    for answer in answers:
        right = " ".join(answer.lower().split())
        length = max(len(answer.upper()), len(prediction.upper()))
        best = max(best, 1.0 - edit_distance(said, right) / length if length else 1.0)
    return best if best >= _ANLS_THRESHOLD else 0.0


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction is one of the answers after `normalise`, else 0.0.

    What would be normalised to nothing, as the letter A is, keeps its words without the marks around them: else no
    reply would be right there.
    """
    return float(_normalise_to_words(prediction) in {_normalise_to_words(answer) for answer in answers})


def _normalise_to_words(answer: str) -> str:
    line = _one_line(answer).lower()
    return normalise(answer) or line.strip(_PUNCTUATION + ". ") or line


def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction is within 5 % of an answer that is a number, or else equal but for case, else 0.0.

    As in ChartQA, `12 %` counts as 0.12, and an answer of zero must be met as text.
    """
    return float(any(_is_near(prediction.strip(), answer.strip()) for answer in answers))


def _is_near(said: str, right: str) -> bool:
    value, target = _number(said), _number(right)
    if value is not None and target:
        return abs(value - target) <= _RELAXED_SHARE * abs(target)
    return said.lower() == right.lower()


def _number(text: str) -> float | None:
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        return None
    return value / 100 if text.endswith("%") else value


def edit_distance(first: str, second: str) -> int:
    """Count insertions, deletions and replacements of a character between two texts (Levenshtein 1966)."""
    row = list(range(len(first) + 1))
    for i, char in enumerate(second, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(first, start=1):
            changed = diagonal + (char != other)
            diagonal, row[j] = row[j], min(changed, row[j] + 1, row[j - 1] + 1)
    return row[-1]


def number_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1.0 if the prediction is one of the answers' numbers, in digits or as a word up to ten, else 0.0."""
    said = normalise(prediction)
    return float(said.isdecimal() and any(int(said) == int(answer) for answer in answers))
