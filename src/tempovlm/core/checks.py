"""Convert and check values that a caller passes; invalid ones raise an error of one line.

Numbers of NumPy and torch count as numbers, also as arrays and tensors without dimensions. They are recognised
by their methods, because this layer imports neither library. Results are plain `int`, `float` and `str`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from numbers import Real

from tempovlm.core.errors import UserError, did_you_mean

_SHOWN = 60
"""Maximum number of letters of a wrong value that a message shows, unless it says otherwise."""

PATH_SHOWN = 4096
"""Maximum number of letters of a path."""

_PLAIN = (int, float, str, bool)


def shown(value: object, most: int = _SHOWN) -> str:
    """Return a description of any value, on one line and of `most` letters."""
    try:
        text = " ".join(str(value).split())
    except Exception:  # noqa: BLE001 - a value of any type may refuse, an integer of 5,000 digits among them
        return f"(a {type(value).__name__})"
    return text if len(text) <= most else f"{text[:most]}…"


def wrong_argument(name: str, value: object, fault: str, most: int = _SHOWN) -> UserError:
    """Return the error that an argument has a wrong value, of which `most` letters are shown.

    `name` is also the name of its flag, which the message on the command line names.
    """
    plain = text(value)
    quoted = shown(value, most) if plain is None else repr(shown(plain, most))
    return UserError(f"{name}={quoted}: {fault}", f"--{name} {shown(value, most)}: {fault}")


def check_names(given: Iterable[str], known: Sequence[str]) -> None:
    """Raise a `UserError` that names the first argument that is not known, and suggests the nearest one."""
    for name in given:
        if name not in known:
            raise UserError(f"{name}: no such argument; {did_you_mean(name, known)}choose from {', '.join(known)}")


def finite(value: object) -> float | None:
    """Return a value as a finite number, integers as integers; None for booleans, text and the rest."""
    if type(value) is float:  # the usual case, without looks at abstract classes
        return value if math.isfinite(value) else None
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, Real | Decimal):
        return None
    try:
        number = float(plain)
    except (OverflowError, ValueError):
        return None
    whole = integer(plain)
    return whole if whole is not None else number if math.isfinite(number) else None


def integer(value: object) -> int | None:
    """Return a value as an integer; None for booleans, whole floats, text and the rest."""
    plain = _plain(value)
    if isinstance(plain, bool):
        return None
    try:
        return operator.index(plain)  # type: ignore[arg-type]
    except TypeError:
        return None


def text(value: object) -> str | None:
    """Return a value as a plain `str`; None for everything but text."""
    return str.__str__(value) if isinstance(value, str) else None


def _kind(value: object) -> str:
    return "text" if isinstance(value, str) else type(value).__name__


def _plain(value: object) -> object:
    """Return the scalar of an array or tensor without dimensions, or of a NumPy scalar."""
    if type(value) in _PLAIN:
        return value
    item, kind = getattr(value, "item", None), getattr(getattr(value, "dtype", None), "kind", None)
    if kind in ("m", "M"):
        return None  # NumPy's times claim to be integers
    if not callable(item) or getattr(value, "ndim", None) != 0:
        return value
    try:
        return item()
    except (TypeError, ValueError, RuntimeError):  # a tensor without data, such as one on the device meta
        return value


def checked_number(
    name: str, value: object, meaning: str, accepts: Callable[[float], bool] = lambda number: number >= 0
) -> float:
    """Return a finite number that is accepted, by default zero or a positive one.

    Args:
        name: name of the argument and of its flag.
        value: any value.
        meaning: of a right value; ends the phrase "must be".
        accepts: whether a number is right.

    Raises:
        UserError: it is not such a number; names the argument.
    """
    number = finite(value)
    if number is None or not accepts(number):
        raise wrong_argument(name, value, f"must be {meaning}" + (", not text" if isinstance(value, str) else ""))
    return number


def checked_integer(name: str, value: object, least: int | None = None, most: int | None = None) -> int:
    """Return an integer within the given bounds.

    Raises:
        UserError: it is not an integer, or out of range; names the argument.
    """
    found = integer(value)
    if found is None:
        raise wrong_argument(name, value, f"must be an integer, not {_kind(value)}")
    too_little, too_much = least is not None and found < least, most is not None and found > most
    if too_little or too_much:
        limits = f"at least {least}" if most is None else f"from {least} to {most}"
        raise wrong_argument(name, found, f"must be {limits}")
    return found


def checked_megabytes(megabytes: object) -> float:
    """Return the size of the cache for features of pictures, in MB.

    Raises:
        UserError: it is negative or not a finite number.
    """
    return checked_number("feature_cache_mb", megabytes, "a size in megabytes, or 0 for no cache")


def checked_flag(name: str, value: object) -> bool:
    """Return a boolean.

    Raises:
        UserError: it is not a boolean; names the argument.
    """
    plain = _plain(value)
    if not isinstance(plain, bool):
        raise wrong_argument(name, value, f"must be True or False, not {_kind(value)}")
    return plain


def checked_text(name: str, value: object) -> str:
    """Return text that can be encoded in UTF-8.

    Raises:
        UserError: it is not such text; names the argument.
    """
    found = text(value)
    if found is None:
        raise UserError(f"{name}: must be text, not {_kind(value)}")
    try:
        found.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name}: {found!r} holds bytes that are no UTF-8; write it in UTF-8") from None
    return found


def checked_texts(name: str, value: object) -> tuple[str, ...]:
    """Return several texts that are not empty.

    Raises:
        UserError: they are not such texts; names the argument.
    """
    several = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)
    try:
        found = [text(one) for one in value] if several else [None]  # type: ignore[attr-defined]
    except TypeError:  # an array without dimensions
        found = [None]
    texts = [one for one in found if one]
    if len(texts) < len(found):
        raise wrong_argument(name, value, "must be a tuple of texts that are not empty")
    return tuple(checked_text(name, one) for one in texts)
