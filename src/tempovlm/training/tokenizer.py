"""The pocket model's tokenizer: known words are one token, everything else is spelled in characters."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tempovlm.model.prompt import CONTROL_TOKENS

UNKNOWN = "[unk]"
INSIDE = "##"
"""Prefix of word-list entries that stand inside a word."""

_QUOTES = "[\u2018\u2019\u201a\u201b\u2032\u02bc\u00b4`]"
_MARKS = (
    (rf"(?<=\w){_QUOTES}(?=\w)", "'"),  # the apostrophe, and what is typed for it
    (_QUOTES, ""),
    (r"[\u2014\u2015]|(?<=\s)\u2013(?=\s)", " "),  # dashes between clauses
    (r"[\u2010-\u2013\u2212]", "-"),  # hyphens, the dash of ranges, minus
    (r"[\u2122\u2120]", ""),  # trade and service marks, which the compatibility form makes letters of
)
"""Replacements of marks by one of the alphabet, where the compatibility form would not do."""

_INVISIBLE = r"\p{Cf}|[\p{Cc}&&\S]"
"""Invisible characters: byte-order mark, zero width, soft hyphen, directions; and control characters."""

_DROPPED = r"[\p{P}&&[^\x00-\x7f]]|\p{So}"
"""Punctuation beyond ASCII's, and pictures."""

_DROPPED_ASCII = '!"()[]{};*'
"""Quotes, brackets and shouts, which are dropped if the alphabet lacks them."""


def build_tokenizer(words: Iterable[str], alphabet: Iterable[str], size: int) -> Tokenizer:
    """A lower-casing WordPiece tokenizer over whole words and single characters.

    One character that the alphabet lacks makes the whole word unknown. So typographic marks are replaced by plain
    ones, accents are removed, and characters that are not letters are dropped.

    Ids: unknown, characters (first of a word, then inside one), words, control tokens last. Control tokens are
    not in the word list, so text can never become one.

    Raises:
        ValueError: words, characters and control tokens exceed `size`.
    """
    characters = sorted(set(alphabet))
    entries = [UNKNOWN, *characters, *(f"{INSIDE}{c}" for c in characters)]
    entries += sorted({word for word in words if len(word) > 1} - set(entries))
    if len(entries) + len(CONTROL_TOKENS) > size:
        raise ValueError(f"{len(entries)} entries and {len(CONTROL_TOKENS)} control tokens exceed {size}")
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN, max_input_chars_per_word=64))
    dropped = [_DROPPED, *(re.escape(mark) for mark in _DROPPED_ASCII if mark not in characters)]
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(_INVISIBLE), ""),
            *(normalizers.Replace(Regex(mark), content) for mark, content in _MARKS),
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Replace(Regex("|".join(dropped)), ""),
            normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # The second decoder sees the first one's output, which keeps the prefix of an answer's first piece.
    tokenizer.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix=INSIDE, cleanup=False), decoders.Replace(INSIDE, "")]
    )
    tokenizer.add_special_tokens(list(CONTROL_TOKENS))
    return tokenizer
