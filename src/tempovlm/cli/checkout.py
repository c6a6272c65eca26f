"""Find a checkout of the repository and import its `experiments`, which are not part of the package."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

from tempovlm.core.errors import UserError

_SCRIPTS = Path("experiments/controller")


def find_checkout(given: Path | None) -> Path:
    """Return the root of a checkout: the given folder, or that of the package, or the current directory.

    Raises:
        UserError: the experiments are not there.
    """
    import tempovlm

    places = [given] if given else [Path(str(tempovlm.__file__)).parents[2], Path.cwd()]
    for place in places:
        if (place / _SCRIPTS).is_dir():
            return place.resolve()
    named = "--repository" if given is None else f"--repository {given}"
    raise UserError(
        f"{named}: no folder {_SCRIPTS} there; the experiments are not part of the package: run this in a "
        "checkout of the repository, or give its root"
    )


def import_experiments(checkout: Path, name: str) -> ModuleType:
    """Import a module of a checkout's `experiments`.

    Raises:
        UserError: it is not there.
    """
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    try:
        return importlib.import_module(f"experiments.{name}")
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("experiments"):
            raise
        raise UserError(f"{checkout}: {error.name} is not there; the checkout has another version") from None
