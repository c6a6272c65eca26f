"""From a policy's name to the policy: a checkpoint, or the trained controller that travels with a model.

That one is a single file in the model's folder. It is used where it fits: a model of the same knob space and the
same weights, on the kind of device whose milliseconds it learned, because what 30 ms are worth on a GPU says
nothing about a CPU. Knows neither the model nor how a controller is trained.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tempovlm.control.policies import TUNED, is_tuned, named_tuned
from tempovlm.core.knobs import KnobSpace
from tempovlm.core.paths import check_file, is_there

if TYPE_CHECKING:
    from tempovlm.control.observation import Encodes, HasDecoder
    from tempovlm.control.policy import Policy

FILE = "controller.pt"
"""Name of a controller checkpoint in a model's folder."""

_log = logging.getLogger("tempovlm")


@dataclass(frozen=True, slots=True)
class Chooser:
    """The model that a policy is to choose for.

    Attributes:
        folder: where its files are. space: its settings.
        model: whose token embeddings are the language feature. tokenizer: of the same model.
        weights: hash of its weights. device: kind of device that it runs on, `cpu` or `cuda`.
    """

    folder: Path
    space: KnobSpace
    model: HasDecoder
    tokenizer: Encodes
    weights: str
    device: str


def find_policy(wanted: str | Path | Policy, chooser: Chooser) -> str | Path | Policy:
    """What is wanted, with `auto`, `table:NAME` and a checkpoint's path resolved.

    `auto` is the table where no controller fits.

    Raises:
        UserError: the checkpoint is damaged, or of another model; or the model was not tuned on those questions.
    """
    if not isinstance(wanted, str | Path) or wanted in ("table", "fixed"):
        return wanted
    if wanted == "auto":
        return shipped_policy(chooser) or "table"
    if is_tuned(wanted):
        return named_tuned(str(wanted).removeprefix(TUNED), chooser.weights, chooser.space).policy(chooser.space)
    from tempovlm.control.learned import policy_from_checkpoint

    return policy_from_checkpoint(Path(wanted), chooser.space, chooser.model, chooser.tokenizer, chooser.weights)


def shipped_policy(chooser: Chooser) -> Policy | None:
    """The policy of the controller in the model's folder; None where there is none or it does not fit.

    Raises:
        UserError: the file is damaged, or holds a controller that no policy runs.
    """
    path, space = chooser.folder / FILE, chooser.space
    if not is_there(path):
        return None
    check_file(path, "copy it again from the model's folder, or remove it")
    from tempovlm.control.checkpoint import fingerprint
    from tempovlm.control.learned import policy_from_checkpoint

    own = fingerprint(path)
    wanted = {"knob_space": space.fingerprint, "weights": chooser.weights, "device": chooser.device}
    for name, value in wanted.items():
        if getattr(own, name) != value:
            _log.info("%s: field %s is %s, not %s: the table decides", path, name, getattr(own, name), value)
            return None
    return policy_from_checkpoint(path, space, chooser.model, chooser.tokenizer, chooser.weights)
