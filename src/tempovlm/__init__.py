"""TempoVLM: a vision-language model that answers within a deadline.

Importing this package does not import torch; `load` imports the heavy parts when it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tempovlm.core.errors import UserError
from tempovlm.core.knobs import KnobConfig, KnobSpace
from tempovlm.core.request import Answer, Request
from tempovlm.core.stamp import __version__

if TYPE_CHECKING:
    from tempovlm.api import TempoVLM

__all__ = ["Answer", "KnobConfig", "KnobSpace", "Request", "UserError", "__version__", "load"]


def load(model: str = "pocket", **options: Any) -> TempoVLM:
    """Load a model and everything it needs to answer within a budget; see `tempovlm.api.load`.

    Raises:
        UserError: an argument is unknown or invalid.
    """
    from inspect import signature

    from tempovlm.api import load as load_model
    from tempovlm.core.checks import check_names

    check_names(options, [*signature(load_model).parameters][1:])
    return load_model(model, **options)
