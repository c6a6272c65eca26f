"""Find the option of a multiple choice question that a reply means.

Works on a reply and the options' texts. Public programs read
letters only. ScienceQA's own (github.com/lupantech/ScienceQA, models/run_gpt3.py) reads the one capital that
follows `The answer is`, and guesses at random where there is not one; LLaVA's (llava/eval/eval_science_qa.py)
also a lone capital and one at the beginning, as in `B. north`; lmms-eval (lmms_eval/tasks/scienceqa/utils.py)
only these two. Replies that they read are read here in the same way, except that nothing is guessed, that a reply
which is an option's whole text (`A. Lincoln`) means that option, that `A` before a further word is an article
(`The
answer is A magnet`), and that `The answer is` wins over a letter at the beginning, on which they differ.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tempovlm.data.metrics.text import normalise

_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")
_BESIDE = "'\"`*()[]{}"
_BEHIND = _BESIDE + ".,:;!?"
"""Marks that may surround a word and are not part of it; a sign or a point before a number is."""
_HIDDEN = "\0"

_LETTER = r"(?<![\w°])(?<!\w['-])[A-Za-z](?!['-]?\w)"
_LETTERS = rf"{_LETTER}(?:(?:,? (?:and|or) |, ?| ?[/&] ?){_LETTER})*"
_END = (
    r"(?=\s?(?:$|\n|[,:;!?)\]}\"'*`]|\.(?!\w)|[–—-]\s|(?:because|since|as|due|which|and|but|so|not)\b"
    r"|is (?:the )?(?:right|correct|best|answer)\b))"
)
"""Pattern after a letter that is meant as an option's letter."""
_START = r"(?:^|[:(\[{*\"`\n]|(?<!\w)'|(?<!\b[A-Za-z]),\s|[.;!?]\s|\s[–—-]\s)\s?"
_VERB = (
    r"(?i:\b(?:is|was|be|say|choose|chose|pick|select|think|guess|believe|so|thus|therefore)"
    r"|\bgo(?:ing)? (?:with|for)|'s)"
)
_LABEL = r"(?i:option|choice|letter|answer)"

_ANSWER = re.compile(
    r"(?i:\banswer(?: (?:is|was|(?:would|must|should|will) be))?:?)\s?"
    rf"(?:{_LABEL}:? )?[(\[{{*\"'`\s]*(?:({_LETTERS}){_END}|((?!A [a-z]){_LETTERS}(?<=[A-Z])))"
)
_STATED = re.compile(
    rf"(?:{_START}|{_VERB} (?:the )?(?:{_LABEL} )?|\b{_LABEL} )({_LETTERS}){_END}"
    rf"|\b{_LABEL} ({_LETTERS})(?<=[A-Z])"
)
_LED = re.compile(rf"\W*{_LETTER}\s?[.,)\]}}\n]")
"""A letter that a mark separates from the text behind it, so that `A` is not an article."""


def choice_accuracy(prediction: str, options: Sequence[str], answer_index: int) -> float:
    """Return 1.0 if the prediction means the right option, else 0.0."""
    return float(choice_index(prediction, options) == answer_index)


def choice_index(prediction: str, options: Sequence[str]) -> int:
    """Return the index of the option that a prediction means, -1 if none or more than one.

    The first of these rules that matches exactly one option:

    1. The reply is a letter, in any case and with marks around it (`B`, `(b)`, `**B**.`), and an option has it.
    2. The reply is an option's text: but for case, blanks, quotes and marks around its words; then as VQA accuracy
       compares texts, see `normalise`, so without articles and with `two` as `2`.
    3. A letter stands after `answer`, as in `The answer is B.`
    4. A letter is stated otherwise: as a clause of its own (`B: north`, `On the map, (B).`) or after a word that
       leads to one (`I think it is B.`, `I choose B because …`, `option B`).
    5. The text of one option alone stands in the reply. A longer text hides the shorter ones that it contains, so
       `north east` does not mention `north`.

    A letter inside an option's text that stands in the reply (`Solution A`) is part of that text and never a
    letter of 3 or 4, and an article before such a text is none either. Letters without an option are skipped.

    Ambiguous cases: a lone or stated letter is the option's letter even if another option's
    text is that letter (`B` with the options `b`, `a`), since questions ask for letters and every public program
    reads them so. A letter before another option's text (`A. north` where that is B) counts, as it does there. Two
    different letters (`A or B`), two texts, or a text that two options share mean none, even if only the right
    letter would count as a hit.

    Args:
        prediction: What the model said.
        options: Texts of the options; the first has the letter A.
    """
    said = re.sub(r"\s+", lambda blank: "\n" if "\n" in blank[0] else " ", prediction.translate(_QUOTES).strip())
    texts = [option.translate(_QUOTES) for option in options]
    forms = [
        (_plain(said), [_plain(text) for text in texts]),
        (normalise(said), [normalise(text) for text in texts]),
    ]
    lone = _named(_plain(said), len(options))
    if lone:
        return lone.pop()
    for reply, own in forms[:1] if _LED.match(said) else forms:
        same = [index for index, text in enumerate(own) if text and text == reply]
        if len(same) == 1:
            return same[0]
    rest = _without_texts(said, texts)
    for pattern in (_ANSWER, _STATED):
        letters = [
            letter for match in pattern.finditer(rest) for letter in re.findall(_LETTER, match[1] or match[2])
        ]
        stated = {index for letter in letters for index in _named(letter, len(options))}
        if len(stated) == 1:
            return stated.pop()
    sought = [text if bare else "" for text, bare in zip(*(own for _, own in forms), strict=True)]
    inside = _mentioned(forms[0][0], sought) | _mentioned(forms[1][0], _alone(forms[1][1]))
    return inside.pop() if len(inside) == 1 else -1


def _plain(text: str) -> str:
    """Return a text in lower case, without the marks around its words."""
    return " ".join(word.lstrip(_BESIDE).rstrip(_BEHIND) or word for word in text.casefold().split())


def _named(letter: str, count: int) -> set[int]:
    """Return the index of a letter's option among `count`; none if it is not a letter of an option."""
    if len(letter) != 1 or not letter.isascii() or not letter.isalpha():
        return set()
    return {index for index in (ord(letter.upper()) - ord("A"),) if index < count}


def _without_texts(said: str, texts: Sequence[str]) -> str:
    """Return a reply without the options' texts and the articles before them; single letters stay."""
    for text in sorted(texts, key=len, reverse=True):
        words = r"\s".join(re.escape(word) for word in text.strip(_BEHIND + " ").split())
        if len(_plain(text)) > 1 and words:
            said = re.sub(rf"(?i)(?<!\w)(?:(?:a|an|the) )?{words}(?!\w)", _HIDDEN, said)
    return said


def _mentioned(said: str, texts: Sequence[str]) -> set[int]:
    """Return the options whose text is in a reply, a longer text before the shorter ones within it."""
    rest, found = f" {said} ", set[int]()
    for text in sorted({*texts} - {""}, key=len, reverse=True):
        if f" {text} " in rest:
            rest = rest.replace(f" {text} ", f" {_HIDDEN} ")
            found |= {index for index, own in enumerate(texts) if own == text}
    return found


def _alone(texts: Sequence[str]) -> list[str]:
    """Return the texts that are unique, the others left empty: normalised, 5 and -5 are the same."""
    return [text if texts.count(text) == 1 else "" for text in texts]
