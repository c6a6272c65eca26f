"""Runs a core experiment from a script's flags: loads the model, draws the questions, does what is not done yet.

Loads no torch before the model, whose loading sets the threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tempovlm
from tempovlm.lab.core_exp.plan import SweepPlan, choose_settings, draw_samples
from tempovlm.lab.core_exp.processes import Share
from tempovlm.lab.options import DataFlags, ModelFlags
from tempovlm.lab.script import flag, options_from


@dataclass(frozen=True, kw_only=True)
class RunFlags(ModelFlags, DataFlags):
    """Flags of every script that runs a core experiment, beside those of `SweepPlan`."""

    importance_scores_file: Path | None = flag(None, "importances of the blocks; default: the model's own ranking")
    split: Literal["val", "train"] = flag("val", "questions for validation or for training")


def run_sweep(flags: Mapping[str, Any], folder: Path, *legal: Sequence[str | int] | None) -> list[Path]:
    """Run or resume the sweep that the flags describe.

    Args:
        flags: values of `RunFlags` and `SweepPlan`, `num_samples` and, if it is not Parquet, the `format`.
        folder: where the results go.
        *legal: values of each knob, as `choose_settings` takes them; all settings without any.

    Returns:
        The files of results; none in a process that is not the first.

    Raises:
        UserError: a flag makes no sense, a data set is missing, or the folder holds another sweep.
    """
    share = Share.of_process()
    device = share.device(flags["device"])
    warmup = share.rank == 0 and flags["latency_samples"] > 0  # nothing else is timed
    given: dict[str, Any] = {"policy": "fixed", "calibrate": False, "warmup": warmup}
    model = tempovlm.load(flags["model_path"], device=device, ranking=flags["importance_scores_file"], **given)
    from tempovlm.data.catalog import bed_of
    from tempovlm.lab.core_exp.ledger import Ledger
    from tempovlm.lab.core_exp.sweep import conduct

    plan = options_from(SweepPlan, {**flags, "settings": choose_settings(model.space, *legal)})
    names, split = flags["datasets"], flags["split"]
    samples, source = draw_samples(
        names, split, flags["data_dir"], flags["num_samples"], plan.seed, twins=plan.twins
    )
    form = flags.get("format", "parquet")
    ledger = Ledger(folder, model.stamp(source), model.ranking, plan.conditions(split), form, share.rank)
    ledger.bed = bed_of(names, flags["data_dir"])
    return conduct(model.engine, samples, plan, ledger, share)
