# SPDX-License-Identifier: Apache-2.0
"""Test-time finetuning of many prompts on many machines, by Ray Data. Needs the extra `ray`.

A dataset of prompts goes through `map_batches` with :class:`AdaptRows`, one actor a device, and its
rows are written to parquet as blocks are done:

    rows = unfinished(ray.data.read_parquet(prompts), "out", key="id")
    rows.map_batches(AdaptRows, fn_constructor_args=[setup, ["id"]], concurrency=2, batch_size=8,
                     num_gpus=1).write_parquet("out")

Here the column `id` names a prompt.

Ray starts an actor anew if its process dies, and gives its block to it again: no row is lost or
comes twice. A run that was killed goes on where it stopped: `unfinished` leaves out rows that are
there already.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import nn

from ..finetune import TestTimeFinetuner

Block = dict[str, NDArray[Any]]
Choice = tuple[Sequence[Any], Sequence[int]]
OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)  # of the actor, not of a row


class Setup(NamedTuple):
    """What one actor holds, made in its own process.

    tuner: the finetuner of the actor's own model.
    choose: from a block of rows (a dict of columns) to the examples and counts of each row. It gets
        the whole block, so that all prompts' pools are one call of :func:`hullkit.select`.
    use: from the adapted model and one row to the new columns of that row: numbers or strings.
    """

    tuner: TestTimeFinetuner
    choose: Callable[[Block], Sequence[Choice]]
    use: Callable[[nn.Module, dict[str, Any]], dict[str, Any]]


class AdaptRows:
    """An actor class for `ray.data.Dataset.map_batches`: adapts the model to each row.

    A row that fails becomes its own error: the column `error` has the exception's class and words,
    the columns of `use` are null, and no other row notices. Memory that runs out and signals are
    not taken for errors of a row.

    Args:
        setup: called once in the actor's process. It may load a model, map an index, set threads.
        keep: columns of the dataset to keep, among them one that names the row.

    Calls take and return blocks. Rows come back in their order, with the columns `keep`, those of
    `use`, and `num_updates`, `num_passes`, `error` (null for none).

    >>> import hullkit, numpy, torch
    >>> from hullkit.interop.ray import AdaptRows, Setup
    >>> def setup():
    ...     model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
    ...     tuner = hullkit.TestTimeFinetuner(model)
    ...     choose = lambda block: [([torch.tensor([1, n])], [2]) for n in block["n"].tolist()]
    ...     return Setup(tuner, choose, lambda model, row: {"seen": row["n"] + 1})
    >>> good, bad = AdaptRows(setup, keep=["n"])({"n": numpy.array([2, 99])}).to_pylist()
    >>> good
    {'n': 2, 'num_updates': 2, 'num_passes': 1, 'error': None, 'seen': 3}
    >>> bad["error"].partition(" ids")[0]
    'ValueError: examples[0]: expected'

    Cost: that of the tuner's queries; a block is held in memory.
    """

    def __init__(self, setup: Callable[[], Setup], keep: Sequence[str]) -> None:
        self._setup = setup()
        self._keep = list(keep)

    def __call__(self, block: Block) -> pa.Table:
        missing = [name for name in self._keep if name not in block]
        if missing:
            raise ValueError(f"keep: expected columns of {list(block)}, got {missing}")
        rows = [
            dict(zip(block, values, strict=True))
            for values in zip(*(column.tolist() for column in block.values()), strict=True)
        ]
        choices = self._choices(block, len(rows))
        results = [self._result(row, *pair) for row, pair in zip(rows, choices, strict=True)]
        names = dict.fromkeys(name for result in results for name in result)
        return pa.table({name: [result.get(name) for result in results] for name in names})

    def _choices(self, block: Block, count: int) -> list[tuple[Any, Exception | None]]:
        """Each row's examples and counts, or why there are none."""
        try:
            chosen = list(self._setup.choose(block))
        except OUT_OF_MEMORY:
            raise
        except Exception as error:
            if count == 1:
                return [(None, error)]
            # A row alone fails, and the others are chosen for one by one.
            parts = ({k: column[i : i + 1] for k, column in block.items()} for i in range(count))
            return [choice for part in parts for choice in self._choices(part, 1)]
        if len(chosen) != count:
            raise ValueError(f"choose: expected {count} pairs, one a row, got {len(chosen)}")
        return [(choice, None) for choice in chosen]

    def _result(self, row: dict[str, Any], choice: Any, error: Exception | None) -> dict[str, Any]:
        result: dict[str, Any] = {name: row[name] for name in self._keep}
        result |= dict.fromkeys(("num_updates", "num_passes", "error"))
        if error is None:
            try:
                examples, counts = choice
                with self._setup.tuner.adapted(examples, counts) as model:
                    used = self._setup.use(model, row)
                report = self._setup.tuner.last_report
                assert report is not None
                reported = {"num_updates": report.num_updates, "num_passes": report.num_passes}
                return result | reported | used
            except OUT_OF_MEMORY:
                raise
            except Exception as raised:
                error = raised
        return result | {"error": f"{type(error).__name__}: {error}"}


def unfinished(dataset: Any, directory: str | os.PathLike[str], key: str) -> Any:
    """The rows of a `ray.data.Dataset` that an earlier run has not written to `directory`.

    Files that cannot be read are removed: a run that was killed while it wrote left them, and their
    rows are not finished. Call it before a run starts, not beside one.

    Args:
        dataset: the rows.
        directory: where `write_parquet` writes; it need not exist yet.
        key: the column that names a row, in both.
    Raises:
        ValueError: a file without that column.

    Cost: reads one column of every file; the names of finished rows are held in memory.
    """
    finished: set[Any] = set()
    for path in sorted(Path(directory).glob("*.parquet")):
        try:
            file = pq.ParquetFile(path)
        except pa.ArrowInvalid:  # parquet's end is written last
            path.unlink()
            continue
        with file:
            if key not in file.schema_arrow.names:
                names = file.schema_arrow.names
                raise ValueError(f"key: expected a column of {path}, {names}, got {key!r}")
            finished.update(file.read([key]).column(key).to_pylist())
    if not finished:
        return dataset

    def missing(block: Block) -> NDArray[np.bool_]:
        return np.array([name not in finished for name in block[key].tolist()], dtype=bool)

    return dataset.map_batches(
        lambda block: {name: column[missing(block)] for name, column in block.items()}
    )
