"""Split English text into words of the Penn Treebank, as the official evaluation of COCO's captions does.

That evaluation runs Stanford's PTBTokenizer 3.4.1, a Java program, with `-preserveLines -lowerCase`, and leaves
punctuation out. The rules here were written from that program's output, and tests check them against it; no Java
is
needed. As there, the rule with the longest match wins, what it looks ahead at included, and the first of equally
long ones. In scripts that English does not borrow from, marks and signs only roughly match that program's, whose
Unicode is of 2012.

Source: Marcus, Santorini and Marcinkiewicz, Building a Large Annotated Corpus of English: The Penn Treebank,
Computational Linguistics 19 (1993).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

_NUMERALS = (
    r"\u00b2\u00b3\u00b9\u00bc-\u00be\u2070\u2074-\u2079\u2080-\u2089\u2150-\u2189\u2460-\u249b\u24ea-\u24ff"
    r"\u2776-\u2793"
)
"""Characters that Python counts among letters and digits, and the program does not."""
_MARKS = (
    r"\u00ad\u02c2-\u036f\u0483-\u0487\u0591-\u05c7\u0610-\u061a\u064b-\u065e\u06d6-\u06ed\u0900-\u0955"
    r"\u0e31-\u0e4e"
)
_SYMBOLS = (
    r"\u0091-\u0094\u0096\u0097\u00a1-\u00a9\u00ab\u00ac\u00ae-\u00b4\u00b6-\u00b9\u00bb\u00bf\u00d7\u00f7"
    r"\u2013-\u2026\u2030-\u2042\u2044\u2070\u2074-\u207e\u2080-\u208e\u20a0\u20a4\u20ac\u2100\u2101\u2103-\u2106"
    r"\u2108\u2109\u2114\u2116-\u2118\u211e-\u2123\u2125\u2127\u2129\u212e\u213a\u213b\u2140-\u2144\u214a-\u214d"
    r"\u214f\u2153-\u215e\u2190-\u2bff\u3001\u3002\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
    r"\uffe0\uffe1\uffe5\uffe6"
)
"""Signs that are words of their own; characters that no rule matches, such as emojis, are left out."""
_BASE = rf"(?:(?![{_NUMERALS}])[^\W\d_])"
_LETTER = rf"(?:{_BASE}|[{_MARKS}]|&[aeiouAEIOU](?:acute|grave|uml);)"
"""A letter of any script, or a mark that goes with one."""
_QUOTE = r"(?:['\u2019\u0092]|&apos;)"
_LOOSE_QUOTE = r"(?:['`\u2018\u2019\u201b\u0091\u0092]|&apos;)"
_BLANK = r"[ \t\u00a0\u2000-\u200a\u3000]"
_GAP = rf"(?:{_BLANK}|\n)"
_DIGITS = r"(?:\d*(?:[.:,\u00ad\u066b\u066c]\d+)+|\d+)"
_CLITIC = rf"{_QUOTE}(?i:[msd]|re|ve|ll)"
_NOT = rf"[nN]{_LOOSE_QUOTE}[tT]"
_ACRONYM = r"[A-Za-z](?:\.[A-Za-z])+"
_WORD = rf"{_LETTER}(?:{_LETTER}|\d)*(?:[.!?]{_LETTER}(?:{_LETTER}|\d)*)*"
"""Letters and digits from a letter on, dots inside included: `node.js`."""
_PART = rf"(?:(?:[dDoOlL]{_LOOSE_QUOTE}(?:{_BASE}|\d))?(?:{_BASE}|\d)+)"
_JOINED = rf"{_PART}(?:[-_\u058a\u2010\u2011]{_PART})*"
"""Words joined by hyphens, French and Irish ones among them: `O'Brien-like`, `two-year-old`."""
_CHAINED = rf"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:{_ACRONYM}\.|[A-Za-z0-9\u00ad]+))+"
"""Words with dots or commas, joined by hyphens: `non-U.S.`, `St.-Denis`, `5.5-inch`."""
_FIRM = r"[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+"
"""`AT&T`."""
_TAG = r"</?[A-Za-z!?][^<>\n]*>"
_HOST = r"[^ \t\n\f\r\"`'<>|.!?(){},\-_$0-9A-Z/:;=@\[\]\\^]+"
_PLACE = r"[^ \t\n\f\r\"<>|(){}.\u00a0]+"
_PATH = r"(?:/[^ \t\n\f\r\"<>|()]+[^ \t\n\f\r\"<>|.!?(){},-])?"

_TITLES = (
    "Adj|Adm|Adv|Alex|Assoc|Asst|Attys?|Ave|Brig|Capt|Cf|Cie|Cmdr|Col|Comdr|Cpl|Dept|Det|Drs?|Elec|Ens|Ft|Gen|Govs?"
    "|Hon|Insp|Invt|Jos|Lieut|Lt|Maj|Messrs|Mfg|Mlle|Mme|Mrs?|Ms|Msgr|Mt|Mtg|Natl|Pfc|Ph|Pres|Profs?|Pvt|Reps?|Rev"
    "|Sens?|Sfc|Sgt|Spc|Ste?|Supts?|Vs|Wm"
)
"""Abbreviations after which a sentence goes on."""
_ABBREVIATIONS = (
    "Al|Ala|Apr|Ariz|Assn|Aug|Bhd|Bldg|Blvd|Bros|Calif|Colo|Conn|Corp|Cos?|Ct|Dak|Dec|Esq|Est|Etc|Ext|Feb|Fla|Fri"
    "|Ga|Inc|Ind|Intl|Jan|Jr|Jul|Jun|Kans?|Ky|Ltd|Mar|Md|Mich|Minn|Mo|Mon|Mont|Neb|Nev|Nov|Oct|Okla|Penn|Plc|Ppte"
    "|Ppty|Ptes?|Ptys?|Rd|Rt|Sept?|Seq|Sq|Sr|Sys|Tel|Tenn|Thu|Thurs|Tues?|Univ|Va|Vt|Wed|Wisc?|Wyo"
)
"""Abbreviations that may end a sentence."""
_STATES = "A(?i:rk|z)|D(?i:el)|I(?i:ll)|L(?i:a)|M(?i:ass|iss)|O(?i:re)|P(?i:a)|T(?i:ex)|W(?i:ash)"
"""Abbreviations that are words unless they begin with a capital."""
_NUMBERED = "art|ca|figs?|nos?|op|pp|prop"
"""Abbreviations before a number, and words elsewhere."""
_OPENINGS = (
    "A|About|According|Additionally|After|An|As|At|But|Earlier|He|Her|Here|However|If|In|It|Last|Many|More|Mr\\."
    "|Ms\\.|Now|Once|One|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|This|We|What"
    "|When|While|Yet|You"
)
"""Words that open a sentence: before them, the dot of a single letter ends one."""
_SUFFIXES = (
    "bat|bmp|c|class|cgi|cpp|dll|doc|docx|exe|gif|gz|h|htm|html|jar|java|jpeg|jpg|mov|mp3|pdf|php|pl|png|ppt|ps|py"
    "|sql|tar|txt|wav|x|xml|zip|wmv"
)
"""File endings."""
_ASSIMILATED = ("can not", "gon na", "got ta", "lem me", "gim me", "wan na")

_RULES: tuple[tuple[str, str], ...] = (
    (_TAG, ""),
    *((f"(?i:{first})", f"(?i:{second})") for first, second in (pair.split() for pair in _ASSIMILATED)),
    (r"(?i:more)", rf"{_QUOTE}n"),
    (r"'(?i:t)", r"(?i:is|was)"),
    (_WORD, _CLITIC),
    (rf"(?i:y){_QUOTE}", _LETTER),
    (rf"{_QUOTE}[nN]", _GAP),
    (rf"(?i:{_QUOTE}(?:n{_QUOTE}|em)|[ldj]{_QUOTE}|(?:dunkin|somethin|ol){_QUOTE}|cap{_QUOTE}n)", ""),
    (rf"{_QUOTE}(?:[2-9]0[sS]|(?i:till?|cause))", ""),
    (rf"[A-HJ-XZn]{_LOOSE_QUOTE}{_LETTER}{{2,}}", ""),
    (rf"{_LETTER}+[aeiouyAEIOUY]{_LOOSE_QUOTE}[aeiouA-Z]{_LETTER}*", ""),
    (rf"(?i:e'er|c'mon|s'mores|ev'ry|li'l|nat'l|o{_LOOSE_QUOTE}o|o'clock)", ""),
    (rf"{_QUOTE}\d\d", _GAP),
    (_CLITIC, r"[^A-Za-z]"),
    ("'", r"[A-Za-z][^ \t\n]"),
    (rf"{_CLITIC}|{_QUOTE}[nN]", ""),
    (_NOT, ""),
    (r"[A-Za-z]*[A-MO-Za-mo-z]", _NOT),
    (_WORD, ""),
    (
        r"(?:<|&lt;)?[a-zA-Z0-9][^ \t\n\f\r\"<>|()\u00a0{}]*"  # name@host
        rf"@(?:{_PLACE}\.)*{_PLACE}(?:>|&gt;)?",
        "",
    ),
    (rf"(?:(?i:{_ABBREVIATIONS})|{_STATES})\.|(?i:[pe][hd]\.d)\.", r"[\s\S]{2}"),
    (_JOINED, ""),
    (rf"[sS]&L[sS]|{_FIRM}", ""),
    (r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}", ""),
    (_CHAINED, ""),
    (r"(?i:https?)://[^ \t\n\f\r\"<>|(){}]+[^ \t\n\f\r\"<>|.!?(){},-]", ""),
    (rf"(?i:www)\.(?:[^ \t\n\f\r\"<>|.!?(){{}},]+\.)+[a-zA-Z]{{2,4}}{_PATH}", ""),
    (rf"(?:{_HOST}\.)+(?:com|net|org|edu){_PATH}", ""),
    (rf"@[A-Za-z_][A-Za-z_0-9]*|#{_LETTER}+|@{{2,}}|#{{2,}}", ""),
    (rf"(?i:{_TITLES})\.", ""),
    (rf"(?i:{_NUMBERED})\.", rf"{_GAP}?\d"),
    (rf"{_ACRONYM}\.|[A-Za-z]\.|(?:Canada|Sino|Korean|EU|Japan|non)-U\.S\.", ""),
    (r"[A-Za-z]", rf"\.{_GAP}+(?:{_OPENINGS}|{_TAG}){_GAP}"),
    *((rf"(?:{thing})\.", r"[,;:]") for thing in (_WORD, _JOINED, _CHAINED, _FIRM)),
    (r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}", ""),
    (rf"[-+]?{_DIGITS}", ""),
    (r"[\u207a\u207b\u208a\u208b]?(?:[\u00b2\u00b3\u00b9\u2070\u2074-\u2079]+|[\u2080-\u2089]+)", ""),
    (r"(?:\d{1,4}[- \u00a0])?\d{1,4}(?:\\?/|\u2044)\d{1,4}", ""),
    (
        r"(?:\(\d{2,3}\)[ \u00a0]?|\+{0,2}(?:\d{2,4}[- \u00a0])?\d{2,4}[- \u00a0])\d{3,4}[- \u00a0]?\d{3,5}"
        r"|(?:\+{0,2}\d{2,4}\.)?\d{2,4}\.\d{3,4}\.\d{3,5}",
        "",
    ),
    (rf"(?:{_BASE}|\d)+(?:\.(?:{_BASE}|\d)+)*\.(?i:{_SUFFIXES})", rf"{_GAP}|[.?!,]"),
    (r"[A-Z]*\$", ""),
    (r"[cC]\+\+|[CcFf]#", ""),
    (r"\.{3,5}|(?:\.[ \u00a0]){2,4}\.", ""),
    (r"[?!]+|-+|<<|>>|''|_+|\\\*|\*+", ""),
    (r"[`\u0091-\u0094\u2018\u2019\u201a-\u201e\u2039\u203a\u00ab\u00bb]{1,2}", ""),
    (r"&(?i:amp|lt|gt|quot|nbsp|apos|mdash|ndash|HT|TL|UR|LR|QC|QL|QR|odq|cdq|#\d+);", ""),
    (r"-[LR][RCS]B-|-[lr][rcs]b-", ""),
    (r"[<>]?[:;=][-o*']?[()DPdpO\\@|{\[\]]", r"[^A-Za-z0-9]"),
    (r"[-^x=~<>']_[-^x=~<>']", ""),
    (rf"[!-/:-@\[-`{{-~\u0080\u00bc-\u00be{_SYMBOLS}]", ""),
)
"""Pairs of patterns: a word, and the text that must follow it."""
_COMPILED = tuple(re.compile(f"({token})(?:{ahead})") for token, ahead in _RULES)
_SPACE = re.compile(rf"(?:{_BLANK}|[\r\v\f\x1c-\x1e\x85\u2028\u2029])+")
_PLAIN = re.compile(r"[A-Za-z]+(?=[,;?!]?[ \n])|[A-Za-z]{2,}(?=\.\n)|[,;](?=[ \n])|\.(?=\n)")
"""Words that no other rule matches longer, except `_UNPLAIN`: tried first because most words are such."""
_UNPLAIN = re.compile(
    rf"(?i:{'|'.join(_ASSIMILATED).replace(' ', '')}|{_TITLES}|{_ABBREVIATIONS}|{_NUMBERED})|{_STATES}"
)

_SPELLED = {
    **{"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"},
    **{"\u00a3": "#", "\u20ac": "$", "\u0080": "$", "\u00a4": "$", "\u20a0": "$", "\u00a2": "cents"},
    **{"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"},
    **{"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "''", "&apos;": "'", "\u00ad": "-"},
}
"""Words that are spelled differently. The official evaluation removes brackets, but only in capitals."""
_QUOTES = {
    **dict.fromkeys("\u0091\u2018\u201b\u2039`", "`"),
    **dict.fromkeys("\u0092\u2019\u203a", "'"),
    **dict.fromkeys("\u0093\u201c\u00ab", "``"),
    **dict.fromkeys('\u0094\u201d\u00bb"', "''"),
    **{low: low for low in "\u201a\u201e"},
}
_DASH = re.compile(r"-{2,4}|[\u0096\u0097\u2013-\u2015]|&[mn]dash;")
_ELLIPSIS = re.compile(r"\.[. \u00a0]+|\u2026")
_ENDING = re.compile(rf"{_CLITIC}|{_NOT}")
_DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", "&nbsp;"])


def words(captions: Sequence[str]) -> list[str]:
    """Return captions in lower case, their words separated by blanks, without punctuation.

    They are split as the lines of one text, as in the official evaluation. This shows in two places: at the end of
    a caption, a single letter loses its dot if the next one opens with a word such as `A` or `The`, and `no` keeps
    its dot if the next one opens with a number. The last caption is cut like any other; the program, to which the
    end of a text is no end of a line, takes `'09` there for `09`.

    Args:
        captions: One or several; line breaks in them count as blanks.

    Returns:
        A text for each caption. A number that contains a blank, such as `2 1/2`, has a no-break space in its
        place.
    """
    lines: list[list[str]] = [[] for _ in captions]
    # Rules look ahead beyond the end of a line, so the last one gets something to look at.
    text = "\n".join(caption.replace("\n", " ") for caption in captions) + "\n\n"
    for line, token in _tokens(text):
        word = _spelled(token)
        if word not in _DROPPED:
            lines[line].append(word)
    return [" ".join(line) for line in lines]


def _tokens(text: str) -> Iterator[tuple[int, str]]:
    """Yield the index of its line and the text of each token."""
    place = line = 0
    while place < len(text):
        if text[place] == "\n":
            place, line = place + 1, line + 1
        elif space := _SPACE.match(text, place):
            place = space.end()
        elif (plain := _PLAIN.match(text, place)) and not _UNPLAIN.fullmatch(plain[0]):
            yield line, plain[0]
            place = plain.end()
        else:
            found = [match for rule in _COMPILED if (match := rule.match(text, place))]
            best = max(found, key=lambda match: match.end(), default=None)
            end = place + 1 if best is None else best.end(1)
            if best is not None:
                yield line, text[place:end]
            place = end


def _spelled(token: str) -> str:
    """Return a token as the treebank spells it, in lower case."""
    if token in _SPELLED:
        return _SPELLED[token]
    if all(char in _QUOTES for char in token):
        return "".join(_QUOTES[char] for char in token)
    if _DASH.fullmatch(token):
        return "--"
    if _ELLIPSIS.fullmatch(token):
        return "..."
    low = token.lower().replace(" ", "\u00a0").replace("\u00ad", "")
    if _ENDING.fullmatch(token):
        return re.sub(_QUOTE, "'", low).replace("\u2018", "`")
    if re.fullmatch(_FIRM, token):
        return low.replace("&amp;", "&")
    return low.replace("(", _SPELLED["("]).replace(")", _SPELLED[")"])
