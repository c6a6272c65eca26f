"""Trained checkpoints in the simulator: the model's features of every judged question, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tempovlm
from tempovlm.core.errors import UserError
from tempovlm.core.progress import progress_bar
from tempovlm.lab.judge.inputs import Content, Sights
from tempovlm.lab.queueing.choosers import Chooser, of_policy
from tempovlm.lab.queueing.world import World


def learned_choosers(
    names: Sequence[str], world: World, budgets_ms: Sequence[float], model: str, device: str, data_dir: Path | None
) -> dict[str, Chooser]:
    """Return the policies of checkpoints by path, as they score every judged question.

    Args:
        names: paths of checkpoints.
        world: whose questions they are asked.
        budgets_ms: of the requests.
        model: whose features they read.
        device: that computes them.
        data_dir: folder of the data sets.

    Raises:
        UserError: a file cannot be used with this model, or the data are not there.
    """
    if missing := [name for name in names if not Path(name).is_file()]:
        raise UserError(f"--policies {missing[0]}: no such file; give the path of a controller checkpoint")
    loaded = tempovlm.load(model, device=device, policy="fixed", calibrate=False, warmup=False)
    from tempovlm.control.learned.policies import policy_from_checkpoint

    content = Content.read([world.judged], data_dir)
    sights = Sights(loaded.engine.runner, content)
    result = {}
    for name in names:
        parts = (loaded.engine.runner.model, loaded.engine.runner.tokenizer, loaded.weights_hash)
        policy = policy_from_checkpoint(Path(name), world.space, *parts, world.space)
        with progress_bar(f"{name}: scoring {len(world.judged)} questions") as advance:
            result[name] = of_policy(name, policy, world, content, sights, budgets_ms, advance)
    return result
