"""The stand-ins: a module for each, named after its data set, that declares `STAND_IN`."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from tempovlm.core.errors import UserError

if TYPE_CHECKING:
    from tempovlm.testbed.stand_in import StandIn

NAMES = tuple(sorted(module.name for module in iter_modules(__path__)))
"""Data sets that have a stand-in."""


def find(name: str) -> StandIn:
    """Return the stand-in for a data set; imports its module, which draws, only now.

    Raises:
        UserError: There is none.
    """
    if name not in NAMES:
        raise UserError(f"unknown data set {name!r}; choose one of {', '.join(NAMES)}")
    found: StandIn = import_module(f"{__name__}.{name}").STAND_IN
    return found
