"""Copy rows of published results for the same questions, instead of measuring them again.

A generated picture depends only on its number, so a larger test bed contains the questions of a smaller one; a row
belongs to a question if number, picture and kind of question agree.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from tempovlm.core.errors import UserError
from tempovlm.data.sample import Sample
from tempovlm.lab.core_exp.questions import MANIFEST, check_samples
from tempovlm.lab.core_exp.ranking import stored_ranking
from tempovlm.lab.core_exp.store import read_rows, read_stamp, write_rows


def missing(
    folders: Sequence[Path], datasets: Sequence[str], weights_hash: str, knob_space: str, order: Sequence[int]
) -> str | None:
    """Return why results cannot replace a measurement; None if they can.

    Args:
        folders: results directories.
        datasets: each must be in all of them.
        weights_hash: hash of the model's weights.
        knob_space: fingerprint of its settings.
        order: of its blocks by importance.

    Raises:
        UserError: a file is damaged or has no stamp.
    """
    for folder in folders:
        ranking = stored_ranking(folder)
        if ranking is not None and ranking.order != tuple(order):
            return f"{folder} is of other blocks than those that the model runs first"
        for dataset in datasets:
            path = folder / f"{dataset}.parquet"
            if not path.is_file():
                return f"{path} is not there"
            stamp = read_stamp(path)
            if stamp.weights != weights_hash:
                return f"{path} is of the weights {stamp.weights}, not {weights_hash}"
            if stamp.knob_space != knob_space:
                return f"{path} is of another knob space"
    return None


def take_results(
    source: Path, target: Path, samples: Mapping[str, Sequence[Sample]], count: int
) -> dict[str, int]:
    """Write the rows of at most `count` questions of each data set to another results directory.

    Args:
        source: a results directory.
        target: the new directory, which gets the source's manifest too.
        samples: present questions by data set; the first answered ones are taken.
        count: maximum number of questions.

    Returns:
        Number of questions taken of each data set.

    Raises:
        UserError: no question of a data set can be taken, or a file cannot be read or written.
    """
    taken = {}
    for dataset, known in samples.items():
        path = source / f"{dataset}.parquet"
        rows, stamp = read_rows(path)
        answered = {(row.question_id, row.image_id, row.template) for row in rows if row.split == known[0].split}
        keys = [(str(sample.question_id), str(sample.image_id), sample.template) for sample in known]
        wanted = {key[0] for key in [key for key in keys if key in answered][:count]}
        if not wanted:
            raise UserError(
                f"{path}: is about none of the {len(keys)} questions here; give --data_dir with the data that was "
                "measured, or --from_scratch"
            )
        asked = [sample for sample in known if str(sample.question_id) in wanted]
        check_samples([source], known[0].split, asked)
        own = [row for row in rows if row.question_id in wanted and row.split == known[0].split]
        write_rows(target, dataset, own, stamp)
        taken[dataset] = len(wanted)
    if (source / MANIFEST).is_file():
        shutil.copyfile(source / MANIFEST, target / MANIFEST)
    return taken
