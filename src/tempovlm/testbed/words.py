"""Words and characters of the questions, options and answers, for the pocket's tokenizer.

Words are those of the training split, and a few more that people may ask with; `training.tokenizer` numbers them.
"""

from __future__ import annotations

import string
from functools import lru_cache

from tempovlm.testbed.content import companies, facts
from tempovlm.testbed.lexicon import CHARSET, COLORS, ICONS, PLAIN_SHAPES, SIGN_WORDS, plural

_FRAME_WORDS = """object there sign are color at top written say bottom region number animal largest objects yes
smallest or has much price country flag same shape this chain and more line solution attract repel other magnet
middle bar capital gate time clock thermometer box map called colors two from plate bottle will bigger day eats
value predator bars producer concentrated fewer particles fri these magnets each pole faces mon speed limit
highest title name over week stays flat falls rises shown tue license jersey wed thu month had temperature weather
feel mild tallest shortest most got lowest circuit switch warmer colder it see below above least fewest center no
not how many what which who where when is in the of on to does do did show player wear drive fast may for used with
left right light lamp open closed food hot cold north south east west pet pets votes rain fruit bus car shop book
ticket picture best you can have kind thing belong season need would use uses find grow live eat like sound make
legs wheels made why an company
cost together than older one signs menu nearest regions animals higher leftmost rightmost dearest cheapest cheaper
smaller three four five six different be
owns after ahead all away before beside between both but coldest come degrees disc friend go grows heavier heaviest
home inside less life lighter lower neither nor numbers own places plus points real since solutions taken team
teams things those twice under warmest
algae apples april ben birds cara cats clover dan deer eva figs finn frog grass july june krill limes makes march
pears plankton plums seal shrimp snake that toad"""


def split_words(text: str) -> list[str]:
    """Return the lower-case words of a text without surrounding punctuation; single characters are left out."""
    stripped = (word.strip(string.punctuation) for word in text.lower().split())
    return [word for word in stripped if len(word) > 1]


@lru_cache(maxsize=1)
def vocabulary() -> tuple[str, ...]:
    """Return the words of two letters or more that are one token each, sorted.

    All that questions, options and canonical answers of training have are among them.

    Numbers, prices, codes and made-up names, including those of companies, are not words: they are spelled from
    `alphabet`, as are the words that are held out for validation.
    """
    words: set[str] = set(SIGN_WORDS) | set(COLORS[:-1]) | set(ICONS) | set(_FRAME_WORDS.split())
    for shape in PLAIN_SHAPES:
        words |= {shape, plural(shape)}
    for table in facts.FACTS.values():
        for answer in table.values():
            words.update(split_words(answer))
    for phrasings in facts.QUESTIONS.values():
        for phrase in phrasings:
            words.update(split_words(phrase.replace("{ref}", "")))
    for country, (capital, _, _) in facts.FLAGS.items():
        words |= {country, capital}
    for known in companies.COMPANIES.values():
        words.update(known.values())
    for phrasings in companies.COMPANY_QUESTIONS.values():
        for phrase in phrasings:
            words.update(split_words(phrase.replace("{ref}", "")))
    return tuple(sorted(word for word in words if len(word) > 1 and word.isalpha()))


def alphabet() -> tuple[str, ...]:
    """Return every single character that questions, options and answers can contain, in a fixed order."""
    return tuple(sorted(set(CHARSET) | set("?,.:$-' ")))
