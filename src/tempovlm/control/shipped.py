"""From a policy's name to the policy: a checkpoint, or the controller that ships with a model.

The shipped controller is one file in the model's folder. It is used if it fits: same knob space, same
weights, and the kind of device that it was trained for, because a budget of 30 ms on a GPU says
nothing about a CPU.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tempovlm.control.own_policy import checked_policy, is_own_policy, own_policy
from tempovlm.control.policies import TUNED, FixedPolicy, is_tuned, named_tuned
from tempovlm.core.knobs import KnobSpace
from tempovlm.core.paths import check_file, is_there
from tempovlm.core.plan import Ranking

if TYPE_CHECKING:
    from tempovlm.control.learned.observation import Encodes, HasDecoder
    from tempovlm.control.policy import Policy

FILE = "controller.pt"
"""Name of a controller checkpoint in a model's folder."""

_log = logging.getLogger("tempovlm")


@dataclass(frozen=True, slots=True)
class Chooser:
    """The model that a policy chooses for.

    Attributes:
        folder: holds its files. space: the settings to choose among.
        model: its token embeddings are the language feature. tokenizer: of the same model.
        weights_hash: hash of its weights. device: kind of device that it runs on, `cpu` or `cuda`.
        whole: all its settings, which controllers score. ranking: by which its blocks run.
    """

    folder: Path
    space: KnobSpace
    model: HasDecoder
    tokenizer: Encodes
    weights_hash: str
    device: str
    whole: KnobSpace
    ranking: Ranking


def find_policy(wanted: str | Path | Policy, chooser: Chooser) -> str | Path | Policy:
    """Return the wanted policy: all but `table` and `fixed` as an object; `auto` is the table if none fits.

    Raises:
        UserError: the checkpoint is damaged or belongs to another model, the model was not tuned on those
            questions, or a class cannot be used.
    """
    space = chooser.space
    if wanted in ("table", "fixed") or isinstance(wanted, FixedPolicy):
        return wanted
    if wanted == "auto":
        return shipped_policy(chooser) or "table"
    if is_tuned(wanted):
        name = str(wanted).removeprefix(TUNED)
        return named_tuned(name, chooser.weights_hash, space, chooser.ranking).policy(space)
    if is_own_policy(wanted):
        return own_policy(str(wanted), space)
    if not isinstance(wanted, str | Path):
        return checked_policy(wanted, space)
    return _learned(Path(wanted), chooser)


def _learned(path: Path, chooser: Chooser) -> Policy:
    from tempovlm.control.learned.policies import policy_from_checkpoint

    of_model = (chooser.model, chooser.tokenizer, chooser.weights_hash, chooser.whole)
    return policy_from_checkpoint(path, chooser.space, *of_model)


def shipped_policy(chooser: Chooser) -> Policy | None:
    """Return the policy of the controller in the model's folder; None if there is none or it does not fit.

    Raises:
        UserError: the file is damaged, or holds a controller of a kind that no policy runs.
    """
    path = chooser.folder / FILE
    if not is_there(path):
        return None
    check_file(path, "copy it again from the model's folder, or remove it")
    from tempovlm.control.checkpoint import fingerprint

    own = fingerprint(path)
    fields = {
        "knob_space": (own.knob_space, chooser.whole.fingerprint),
        "weights": (own.weights_hash, chooser.weights_hash),
        "device": (own.device, chooser.device),
    }
    for name, (value, wanted) in fields.items():
        if value != wanted:
            _log.info("%s: field %s is %s, not %s: the table decides", path, name, value, wanted)
            return None
    return _learned(path, chooser)
