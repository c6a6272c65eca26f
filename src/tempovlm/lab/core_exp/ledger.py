"""Stores the rows of a sweep so that a kill at any moment neither loses nor duplicates one.

Rows are written in parts, each a small atomic file; at the end the parts and the earlier rows are
merged into one file for each data set, and then the parts are removed. A timed row has the repeats of all passes
up to its own; of duplicate rows, the one with the most repeats is kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tempovlm.core.errors import UserError
from tempovlm.core.files import is_marked, marked, writing_to
from tempovlm.core.paths import write_if_absent, write_whole
from tempovlm.core.plan import Ranking
from tempovlm.core.records import Key, SweepRow, better
from tempovlm.core.stamp import Stamp
from tempovlm.data.digest import Digests
from tempovlm.lab.core_exp import legacy, processes, store
from tempovlm.lab.core_exp.questions import MANIFEST, keep_questions
from tempovlm.testbed.bed import Bed

POLL_S = 0.5
"""Interval between checks of another process's progress."""

_SAME_STAMP = ("hardware", "device", "model", "weights", "knob_space", "data_source")

Format = Literal["parquet", "json"]


@dataclass(slots=True)
class Ledger:
    """All rows of an output directory, by data set and key.

    Attributes:
        folder: the output directory. ranking: which blocks ran, for the JSON layout.
        conditions: further values that all rows must share: seed, split, caps and the like.
        form: format of merged files. rank: rank of this process; only 0 merges.
        bed: what the test bed of the questions was drawn from; None for other data.
        where: the folder was named, in errors.
    """

    folder: Path
    stamp: Stamp
    ranking: Ranking
    conditions: Mapping[str, Any]
    form: Format = "parquet"
    rank: int = 0
    where: str = "--output_dir"
    bed: Bed | None = None
    rows: dict[str, dict[Key, SweepRow]] = field(default_factory=dict)
    _failed: dict[str, set[Key]] = field(default_factory=dict)
    _seen: set[Path] = field(default_factory=set)
    _count: int = 0

    @contextlib.contextmanager
    def opened(self, datasets: Iterable[str], questions: Mapping[str, Digests] | None = None) -> Iterator[Ledger]:
        """Lock the directory, check that its rows belong to this sweep, and read them.

        Args:
            datasets: whose rows to read.
            questions: digests of the questions to ask, by data set; the first process checks and stores them.

        Raises:
            UserError: another process writes there, or its rows were made under other conditions or are about
                other questions.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(
                writing_to(self.folder, self.where)
                if self.rank == 0
                else processes.at_work(self._processes, self.rank)
            )
            self._check_manifest()
            for dataset in datasets:
                # Parts first: while another process merges, a row is in a part, in the merged file, or in both.
                self.refresh(dataset)
                self._read_merged(dataset)
            if self.rank == 0:
                keep_questions(self.folder, self.rows, questions or {}, self.bed)
            self._failed = {
                name: {row.key for row in rows.values() if row.error} for name, rows in self.rows.items()
            }
            if self.rank == 0:
                stack.enter_context(marked(self.folder / MANIFEST))
            yield self

    def await_first(self) -> None:
        """Wait until the first process has checked the directory, then read it.

        All later rows are of this run. So another process's failure is not taken for an earlier one that is to be
        asked again, and nothing is written beside rows of another sweep.
        """
        waiting = processes.Patience(f"{self.folder}: process 0 has not opened it; was it started?")
        while not is_marked(self.folder / MANIFEST):
            waiting.wait(POLL_S)

    def failed_before(self, dataset: str) -> set[Key]:
        """List the rows that failed before this run and were not asked again yet."""
        return self._failed.setdefault(dataset, set())

    def unanswered(self, dataset: str, keys: Iterable[Key]) -> list[Key]:
        """List those of some rows that are unknown, or failed before this run."""
        known, failed = self.rows.get(dataset, {}), self.failed_before(dataset)
        return [key for key in keys if key not in known or (key in failed and not known[key].is_answered)]

    def _check_manifest(self) -> None:
        path = self.folder / MANIFEST
        ours = self._manifest()
        if not path.exists():
            stray = [*self.folder.glob("*.parquet"), *self.folder.glob(f"*/{legacy.PATTERN}")]
            if stray:
                raise UserError(f"{stray[0]}: results without {MANIFEST} beside them; use another --output_dir")
            if write_if_absent(path, json.dumps(ours, indent=2) + "\n"):
                return
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))
            pairs = [(f"stamp.{name}", theirs["stamp"][name], ours["stamp"][name]) for name in _SAME_STAMP]
            pairs += [("ranking", theirs["ranking"], ours["ranking"])]
            pairs += [(name, theirs["conditions"].get(name), value) for name, value in ours["conditions"].items()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: half-written or damaged ({error!r}); use another --output_dir") from None
        for name, old, new in pairs:
            if old != new:
                raise UserError(
                    f"{path}: field {name} is {old!r}, this run's is {new!r}; rows of both in one directory would "
                    "be mixed up: use another --output_dir"
                )

    def _manifest(self) -> dict[str, Any]:
        conditions = json.loads(json.dumps(dict(self.conditions)))
        return {
            "schema": store.SCHEMA,
            "conditions": conditions,
            "ranking": list(self.ranking.order),
            "stamp": self.stamp.to_json(),
        }

    def _read_merged(self, dataset: str) -> None:
        path = self.folder / f"{dataset}.parquet"
        if path.exists():
            self._take(dataset, store.read_rows(path)[0])
        for file in sorted((self.folder / dataset.replace("_", "-")).glob(legacy.PATTERN)):
            self._take(dataset, legacy.read_file(file, dataset).rows)

    def refresh(self, dataset: str) -> dict[Key, SweepRow]:
        """Read the parts written since; return all rows of the data set."""
        for path in sorted(self._parts(dataset).glob("*.jsonl")):
            if path in self._seen:
                continue
            try:
                data = path.read_bytes()
            except FileNotFoundError:  # merged meanwhile
                continue
            self._seen.add(path)
            try:
                lines = data.decode("utf-8").strip("\n").split("\n")
                self._take(dataset, [SweepRow.from_json(json.loads(line), str(path)) for line in lines])
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                raise UserError(f"{path}: damaged ({error}); remove this file and resume") from None
        return self.rows.setdefault(dataset, {})

    def add(self, dataset: str, rows: Iterable[SweepRow]) -> None:
        """Store some rows, all or none of them."""
        new = list(rows)
        lines = [json.dumps(row.to_json(), ensure_ascii=False) for row in new]
        name = f"{self.rank}-{os.getpid()}-{time.time_ns()}-{self._count}.jsonl"
        path = self._parts(dataset) / name
        write_whole(path, "\n".join(lines) + "\n")
        self._count += 1
        self._seen.add(path)
        self._take(dataset, new)

    def _take(self, dataset: str, rows: Iterable[SweepRow]) -> None:
        known, failed = self.rows.setdefault(dataset, {}), self.failed_before(dataset)
        for row in rows:
            failed.discard(row.key)
            old = known.get(row.key)
            known[row.key] = row if old is None else better(old, row)

    def say_done(self) -> None:
        """Tell the first process that this one has finished its share."""
        processes.say_done(self._processes, self.rank)

    def wait_for_others(self, world: int, began_s: float) -> None:
        """Wait until all other processes of a run, which began at this time, have finished their shares.

        Raises:
            UserError: one ended before.
        """
        processes.wait_for(self._processes, range(1, world), began_s)

    @property
    def _processes(self) -> Path:
        return self.folder / store.PARTS / "processes"

    def merge(self, dataset: str, questions: Sequence[str] = ()) -> list[Path]:
        """Write all rows of a data set as its results, then remove its parts and files in the other layout.

        Rows are ordered by the place of their question among `questions`, then by setting, however many processes
        made them and however often they were interrupted.
        """
        places = {question: place for place, question in enumerate(questions)}
        rows = sorted(
            self.refresh(dataset).values(), key=lambda row: (places.get(row.question_id, len(places)), row.key)
        )
        tables = [self.folder / f"{dataset}.parquet"]
        texts = list((self.folder / dataset.replace("_", "-")).glob(legacy.PATTERN))
        if self.form == "json":
            paths = legacy.write_folder(self.folder, dataset, rows, self.stamp, self.ranking)
        else:
            paths = [store.write_rows(self.folder, dataset, rows, self.stamp)]
        for stale in tables if self.form == "json" else texts:
            stale.unlink(missing_ok=True)
        shutil.rmtree(self._parts(dataset), ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty while other data sets have parts
            (self.folder / store.PARTS).rmdir()
        return paths

    def _parts(self, dataset: str) -> Path:
        return self.folder / store.PARTS / dataset
