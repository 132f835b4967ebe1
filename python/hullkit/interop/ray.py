# SPDX-License-Identifier: Apache-2.0
"""Test-time finetuning of many prompts on many machines, by Ray Data. Needs the extra `ray`.

A dataset of prompts goes through `map_batches` with :class:`AdaptRows`, one actor a device, and its
rows are written to parquet as blocks are done:

    rows = unfinished(ray.data.read_parquet(prompts), "out", key="id")
    rows.map_batches(AdaptRows, fn_constructor_args=[setup, ["id"]], batch_size=8, num_gpus=1,
                     batch_format="pyarrow",
                     compute=ray.data.ActorPoolStrategy(size=2)).write_parquet("out")

Here the column `id` names a prompt, each another. With "pyarrow" the columns that are kept have the
types of the dataset in every file; those of NumPy's blocks depend on a block's values. Ray writes
blocks with processors that no actor holds. If there are none, it writes when the actors have ended,
and a run that is killed before then has written nothing.

Ray starts an actor anew if its process dies, and gives its block to it again: no row is lost or
comes twice. It does so for ever, also for a row that ends its process each time, unless
`map_batches` gets `max_restarts` and `max_task_retries`, of which new versions of Ray warn. A run
that was killed goes on where it stopped: `unfinished` leaves out rows that are there already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import nn

from ..finetune import TestTimeFinetuner
from ..language_model.interface import MODEL_ERRORS
from ..prompt_batch import Answer, PromptBatch, Query
from ._ray_unfinished import unfinished

__all__ = ["AdaptRows", "Setup", "unfinished"]

Block = dict[str, NDArray[Any]]
Choice = tuple[Sequence[Any], Sequence[int]]
OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)  # of the actor, not of a row
_REPORTED = {"num_updates": pa.int64(), "num_passes": pa.int64(), "error": pa.string()}


class Setup(NamedTuple):
    """What one actor holds, made in its own process.

    Attributes:
        tuner: the finetuner of the actor's own model, or a `PromptBatch` of it, which adapts to the
            rows of a block together.
        choose: from a block of rows (a dict of columns) to the examples and counts of each row. It
            gets the whole block, so that all prompts' pools are one call of :func:`hullkit.select`.
            The learning rate and the seed are the tuner's for all rows.
        use: from the adapted model and one row to its new columns, numbers or strings. With a
            `PromptBatch` it may run again for a row after the model raised in a pass with others.
        columns: the new columns' types. None: those of the first values in an actor; files may
            differ.

    >>> import hullkit, torch
    >>> from hullkit.interop.ray import Setup
    >>> model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
    >>> choose = lambda block: [([torch.tensor([1, n])], [2]) for n in block["n"].tolist()]
    >>> Setup(hullkit.TestTimeFinetuner(model), choose, lambda model, row: {}).columns is None
    True
    """

    tuner: TestTimeFinetuner | PromptBatch
    choose: Callable[[Block], Sequence[Choice]]
    use: Callable[[nn.Module, dict[str, Any]], dict[str, Any]]
    columns: dict[str, pa.DataType] | None = None


class AdaptRows:
    """An actor class for `ray.data.Dataset.map_batches`: adapts the model to each row.

    A row that fails becomes its own error: the column `error` has the exception's class and words,
    the columns of `use` are null, and no other row notices. Memory that runs out and signals are
    not taken for errors of a row: they end the actor's call, and after Ray's retries the run. With
    a `PromptBatch` memory that runs out for one row's text, or in `use`, is that row's error.

    Args:
        setup: called once in the actor's process. It may load a model, map an index, set threads.
        keep: columns of the dataset to keep, among them one that names the row.

    Calls take blocks, dicts of NumPy's arrays or tables of pyarrow, and return tables. Rows come
    back in their order, with the columns `keep`, those of `use`, and `num_updates`, `num_passes`,
    `error` (null for none). Without `Setup.columns` a column has the type of its first value in an
    actor: return floats where some are. A block of which all rows fail then has no columns of `use`
    if its actor has not yet seen them.

    Raises:
        TypeError: `setup` returns no `Setup`, or one with something else in it; `keep` is no list
            of names. ValueError: a block without a column of `keep`, or not as many choices as
            rows.

    >>> import hullkit, numpy, torch
    >>> from hullkit.interop.ray import AdaptRows, Setup
    >>> def setup():
    ...     model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
    ...     tuner = hullkit.TestTimeFinetuner(model)
    ...     choose = lambda block: [([torch.tensor([1, n])], [2]) for n in block["n"].tolist()]
    ...     return Setup(tuner, choose, lambda model, row: {"seen": row["n"] + 1})
    >>> good, bad = AdaptRows(setup, keep=["n"])({"n": numpy.array([2, 99])}).to_pylist()
    >>> good
    {'n': 2, 'seen': 3, 'num_updates': 2, 'num_passes': 1, 'error': None}
    >>> bad["error"].partition(" ids")[0]
    'ValueError: examples[0]: expected'

    Cost: that of the tuner's queries; a block is held in memory.
    """

    def __init__(self, setup: Callable[[], Setup], keep: Sequence[str]) -> None:
        given: Any = keep
        several = isinstance(given, Iterable) and not isinstance(given, str)
        self._keep = list(keep) if several else []  # once: it may be an iterator
        if not several or not all(isinstance(name, str) for name in self._keep):
            raise TypeError(f"keep: expected a list of names, got {keep!r}")
        for name in self._keep:
            if name in _REPORTED:
                raise ValueError(f"keep: expected other names than {list(_REPORTED)}, got {name!r}")
        made: Any = setup()
        if not isinstance(made, Setup):
            raise TypeError(f"setup: expected it to return a Setup, got {type(made).__name__}")
        tuner: Any = made.tuner
        if not isinstance(tuner, (TestTimeFinetuner, PromptBatch)):
            kind = type(tuner).__name__
            raise TypeError(f"tuner: expected a TestTimeFinetuner or PromptBatch, got {kind}")
        for name in ("choose", "use"):
            if not callable(getattr(made, name)):
                kind = type(getattr(made, name)).__name__
                raise TypeError(f"{name}: expected a callable, got {kind}")
        for name, of in (made.columns or {}).items():
            if name in self._keep or name in _REPORTED:
                raise ValueError(f"columns: expected names of new columns, got {name!r}")
            if not isinstance(of, pa.DataType):
                kind = type(of).__name__
                raise TypeError(f"columns[{name!r}]: expected a pyarrow.DataType, got {kind}")
        self._setup = made
        self._types = dict(made.columns or {})  # of the columns of `use` so far

    def __call__(self, block: Block | pa.Table) -> pa.Table:
        table = block if isinstance(block, pa.Table) else None
        if isinstance(block, pa.Table):
            from ray.data.block import BlockAccessor

            block = BlockAccessor.for_block(block).to_batch_format("numpy")
        missing = [name for name in self._keep if name not in block]
        if missing:
            raise ValueError(f"keep: expected columns of {list(block)}, got {missing}")
        columns = {
            name: _array(name, block[name]) if table is None else table.column(name)
            for name in self._keep
        }
        rows = [
            dict(zip(block, values, strict=True))
            for values in zip(*(column.tolist() for column in block.values()), strict=True)
        ]
        choices = self._choices(block, len(rows))
        if isinstance(self._setup.tuner, PromptBatch):
            results = self._together(self._setup.tuner, rows, choices)
        else:
            results = [
                self._alone(self._setup.tuner, row, *pair)
                for row, pair in zip(rows, choices, strict=True)
            ]
        results = [self._of_columns(result) for result in results]
        for name, of in (self._types | _REPORTED).items():
            columns[name] = pa.array([result.get(name) for result in results], of)
        return pa.table(columns)

    def _of_columns(self, result: dict[str, Any]) -> dict[str, Any]:
        """A row's result, or the error of one whose new values are not of the columns so far."""
        declared = self._setup.columns
        for name in [name for name in result if name not in _REPORTED]:
            if declared is not None:
                error = _misfit(name, result[name], declared)
                if error is not None:
                    return _failed(error)
                continue
            of = pa.array([result[name]]).type
            known = self._types.get(name, of)
            if pa.types.is_null(known):
                continue
            if pa.types.is_integer(of) and pa.types.is_floating(known):
                result[name] = float(result[name])
            elif not pa.types.is_null(of) and of != known:
                what = f"use: expected {known} in the column {name!r}, as in earlier rows, got {of}"
                return _failed(TypeError(what))
            self._types[name] = known
        return result

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
        return [_checked(choice) for choice in chosen]

    def _alone(
        self, tuner: TestTimeFinetuner, row: dict[str, Any], choice: Any, error: Exception | None
    ) -> dict[str, Any]:
        if error is None:
            try:
                examples, counts = choice
                with tuner.adapted(examples, counts) as model:
                    used = self._used(row, model)
                report = tuner.last_report
                assert report is not None
                return used | {"num_updates": report.num_updates, "num_passes": report.num_passes}
            except OUT_OF_MEMORY:
                raise
            except Exception as raised:
                error = raised
        return _failed(error)

    def _together(
        self, batch: PromptBatch, rows: list[dict[str, Any]], choices: list[Any]
    ) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = []
        asked: list[Query] = []
        for row, (choice, error) in zip(rows, choices, strict=True):
            if error is not None:
                results.append(_failed(error))
                continue
            results.append({})
            asked.append(Query(*choice, partial(self._used, row)))  # type: ignore[call-arg]
        left = iter([place for place, result in enumerate(results) if not result])
        for query, answer in zip(asked, self._answers(batch, asked), strict=True):
            if answer.error is not None:
                results[next(left)] = _failed(answer.error)
            else:
                counted = {
                    "num_updates": sum(map(int, query.counts)),
                    "num_passes": len(answer.losses),
                }
                results[next(left)] = answer.value | counted
        return results

    @staticmethod
    def _answers(batch: PromptBatch, queries: list[Query]) -> list[Answer]:
        """A pass that raises ends `map`. Then each query that has no answer is alone."""
        answers: list[Answer] = []
        try:
            for answer in batch.map(queries):
                answers.append(answer)
        except OUT_OF_MEMORY:
            raise
        except MODEL_ERRORS as error:
            if len(queries) == 1:
                return [Answer(0, None, (), error)]
            for query in queries[len(answers) :]:
                answers += AdaptRows._answers(batch, [query])
        return answers

    def _used(self, row: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        """The new columns of a row, after checking that they can be some."""
        used = self._setup.use(model, row)
        if not isinstance(used, dict):
            raise TypeError(f"use: expected a dict of new columns, got {type(used).__name__}")
        taken = sorted(used.keys() & {*self._keep, *_REPORTED})
        if taken:
            raise ValueError(f"use: expected names of new columns, got {taken}")
        for name, value in used.items():
            if not isinstance(name, str):
                raise TypeError(f"use: expected names of columns, got {name!r}")
            try:
                pa.array([value])
            except _NOT_ARROWS:
                kind = type(value).__name__
                raise TypeError(
                    "use: expected numbers that 64 bits hold, or strings, got a value of "
                    f"{kind} in {name!r}"
                ) from None
        return used


_NOT_ARROWS = (pa.ArrowException, TypeError, ValueError, OverflowError)


def _array(name: str, column: NDArray[Any]) -> pa.Array:
    with suppress(*_NOT_ARROWS):  # arrays in rows, and NumPy's own types: by Python's values
        return pa.array(column if column.ndim == 1 else list(column))
    try:
        return pa.array(column.tolist())
    except _NOT_ARROWS as error:
        raise TypeError(
            f"keep: expected values of pyarrow's types in the column {name!r}, got {error}"
        ) from error


def _misfit(name: str, value: Any, declared: dict[str, pa.DataType]) -> Exception | None:
    """Why a value cannot be in a declared column."""
    if name not in declared:
        return ValueError(f"use: expected columns of {[*declared]}, got {name!r}")
    try:
        pa.array([value], declared[name])
    except _NOT_ARROWS as error:
        return TypeError(f"use: expected {declared[name]} in the column {name!r}, got {error}")
    return None


def _checked(choice: Any) -> tuple[Any, Exception | None]:
    if isinstance(choice, (tuple, list)) and len(choice) == 2:
        return choice, None
    what = f"{len(choice)} of them" if type(choice) in (tuple, list) else type(choice).__name__
    return None, TypeError(f"choose: expected a pair of examples and counts, got {what}")


def _failed(error: Exception) -> dict[str, Any]:
    return {"error": f"{type(error).__name__}: {error}"}
