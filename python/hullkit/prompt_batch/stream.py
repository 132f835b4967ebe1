# SPDX-License-Identifier: Apache-2.0
"""Queries that stream through slots: a slot that has finished takes the next one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_finite, check_int
from ..finetune.padding import ALONE, TOGETHER, bucket
from ..finetune.schedule import reuse_schedule
from ..language_model.interface import (
    IGNORED,
    MODEL_ERRORS,
    check_predicted,
    check_token_ids,
    tells_labels,
    token_limits,
)
from .generation import Continuations, Plan, neighbouring
from .queries import Answer, Generate, Query, Score, finite_score, with_own_ids
from .runs import Run, clear_locals
from .untouched import BaseWritten

_AHEAD = 4  # times as many queries as slots may be read before the answer that is due
# A pass, or a call of `generate`, takes much the same time for a few slots as for all. So slots
# wait to be continued until more than this part of them does, or nobody learns. If nothing but
# scores is left to do, at most this part of the slots is scored by calls.
_IDLE = 1 / 4
_OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


class Stream:
    """An iterator of answers in the order of the queries.

    keep: slots keep what they have learned, and take no second query.
    """

    def __init__(self, batch: Any, queries: Iterable[Any], keep: bool) -> None:
        if isinstance(queries, Query) or not isinstance(queries, Iterable):
            kind = type(queries).__name__
            raise TypeError(f"queries: expected an iterable of queries, got {kind}")
        self._batch = batch
        self._queries = enumerate(queries)
        self._failure: Exception | None = None  # of `queries`
        self._keep = keep
        self._runs: list[Run | None] = [None] * batch.slots
        self._free = list(range(batch.slots))[::-1]
        self._stale: list[int] = []  # slots that are to be made fresh
        self._answers: dict[int, Answer] = {}
        self._read = self._due = 0
        self._limits = token_limits(batch.model)
        self._told = tells_labels(batch.model)
        self._continuations = Continuations(batch)
        self._ended = False

    def __iter__(self) -> Iterator[Answer]:
        self._batch._begin()
        self._stale = [*range(len(self._runs))]  # whatever an `adapt_` has left in them
        while True:
            self._reset()
            yield from self._ready()  # first: the next query may be long in coming
            self._fill()
            yield from self._ready()
            if any(run is not None for run in self._runs):
                self._pass()
            elif self._failure is not None:
                self._stale = [*range(len(self._runs))]  # also of what slots keep
                raise self._failure
            elif self._ended or not self._free:  # kept slots take no more
                return

    def _ready(self) -> Iterator[Answer]:
        while self._due in self._answers:
            self._due += 1
            answer = self._answers.pop(self._due - 1)
            clear_locals(answer.error)  # all have ended; they hold the query's examples
            yield answer

    def _fill(self) -> None:
        """Gives the next queries to free slots. A bad query becomes an answer.

        If there is an error instead of a next query, those before it are finished first.
        """
        most = self._due + _AHEAD * self._batch.slots
        while self._free and not self._ended and self._read < most:
            try:
                entry = next(self._queries, None)
            except Exception as error:
                self._failure, entry = error, None
            if entry is None:
                self._ended = True
                return
            index, query = entry
            self._read = index + 1
            slot = self._free.pop()
            try:
                run = self._checked(index, query)
            except Exception as error:  # also of a sequence that reads its examples
                self._answers[index] = Answer(index, None, (), error)
                if not self._keep:  # a kept slot k is of query k, bad ones too
                    self._free.append(slot)
                continue
            self._runs[slot] = run  # first: a signal may come meanwhile
            try:
                self._batch._start(slot, run)
            except Exception as error:  # no memory for the factors of its seed
                self._end(slot, run, Answer(index, None, (), error))

    def _checked(self, index: int, query: Any) -> Run:
        if not isinstance(query, (tuple, list)) or not 2 <= len(query) <= len(Query._fields):
            kind = type(query).__name__
            kind += f" of {len(query)}" if isinstance(query, (tuple, list)) else ""
            raise TypeError(f"query: expected a Query or (examples, counts, then), got {kind}")
        query = Query(*query)
        if isinstance(query.examples, str) or not isinstance(query.examples, Sequence):
            kind = type(query.examples).__name__
            raise TypeError(f"examples: expected a list of examples, got {kind}")
        if query.then is not None and not callable(query.then):
            raise TypeError(f"then: expected a callable, got {type(query.then).__name__}")
        if type(query.then) in (Score, Generate):
            query = query._replace(then=with_own_ids(query.then))
        if query.seed is not None:
            query = query._replace(seed=check_int("seed", query.seed, 0, (1 << 63) - 1))
        bursts = reuse_schedule(query.counts, self._batch.refresh_interval)
        if len(query.examples) != len(query.counts):
            expected, got = len(query.counts), len(query.examples)
            raise ValueError(f"examples: expected {expected}, as counts, got {got}")
        texts = []
        for i, example in enumerate(query.examples):
            texts.append(self._ids(f"examples[{i}]", example))
        run = Run(index, query, texts, bursts)
        run.lr = self._batch.lr if query.lr is None else check_finite("lr", query.lr)
        return run

    def _ids(self, name: str, ids: Any) -> Tensor:
        """Checked ids (T,) on the host, which the caller's changes do not reach."""
        tokens = check_token_ids(name, ids, self._limits)
        if not self._told:
            self._limits = self._limits._replace(labels=self._batch._num_logits(tokens[0]))
            self._told = True
        check_predicted(name, tokens, self._limits)
        return tokens[0].to("cpu", copy=True)

    def _pass(self) -> None:
        """A burst or the score of every busy slot, in as few passes as `rows` allows.

        Where padding would change a text, only those as long as the oldest query's share a pass,
        and the others wait. There is no pass if enough slots wait to be continued, which they are
        then, and if a few have to be scored and nothing else, which are called.
        """
        present = {slot: run for slot, run in enumerate(self._runs) if run is not None}
        waiting = {slot: run for slot, run in present.items() if run.plan is not None}
        others = [None if slot in waiting else run for slot, run in enumerate(self._runs)]
        busy = [run for run in others if run is not None]
        if waiting and (not busy or len(waiting) > _IDLE * len(self._runs)):
            self._continue(waiting)
            return
        if all(run.scored is not None for run in busy) and len(busy) <= _IDLE * len(self._runs):
            for slot, run in enumerate(others):
                if run is not None:
                    self._finish(slot, run)
            return
        oldest = min(busy, key=lambda run: run.index)
        any_length = self._batch._apart or self._batch._pads(oldest.text)
        runs = [
            run if run is not None and (any_length or len(run.text) == len(oldest.text)) else None
            for run in others
        ]
        length = max(self._padded(run.text) for run in runs if run is not None)
        rows = self._batch._rows(length)
        for first in range(0, len(runs), rows):
            group = runs[first : first + rows]
            if any(run is not None for run in group) and not self._group(first, group):
                return  # the rest goes on in smaller groups

    def _padded(self, text: Tensor) -> int:
        if not self._batch._pads(text):
            return len(text)
        lengths = ALONE if self._batch._apart else TOGETHER
        padded = bucket(len(text), self._batch._longest, lengths)
        return padded if self._batch._takes(padded) else len(text)

    def _group(self, first: int, group: list[Run | None]) -> bool:
        """One pass; whether there was memory for it. Without any for a single text, its query has
        the error; if it only had to be scored, its `then` is called."""
        length = max(self._padded(run.text) for run in group if run is not None)
        tokens = torch.zeros(2, len(group), length, dtype=torch.int64, device="cpu")
        tokens[1] = IGNORED
        for row, run in zip(tokens.unbind(1), group, strict=True):
            if run is not None:
                row[0] = F.pad(run.text, (0, length - len(run.text)))
                row[1, : len(run.text)] = run.text
        lacking: Exception | None = None
        passes = self._batch._passes
        passes.updating = False
        try:
            results = self._batch._step(tokens, first, group)
        except _OUT_OF_MEMORY as error:
            if passes.updating:
                raise  # some slots may have their updates, which they must not get twice
            clear_locals(error)
            lacking = error
        if lacking is None:
            ended = []
            for slot, run in enumerate(group, first):
                if run is not None and (failure := run.note(results)) is not None:
                    self._end(slot, run, Answer(run.index, None, (), failure))
                    ended.append(run)
            for slot, run in enumerate(group, first):
                if run is not None and run not in ended and run.learned:
                    self._finish(slot, run, may_wait=run.score is None)
        elif len(group) > 1:
            self._batch._room.note_too_large(len(group), length)
            return False
        else:
            [run] = group
            assert run is not None
            if run.scored is None:
                self._end(first, run, Answer(run.index, None, (), lacking))
            else:  # a call takes less memory than a pass
                self._finish(first, run)
        return True

    def _to_score(self, run: Run) -> Tensor | None:
        """The ids of a `Score` that comes with the next pass, which is not longer for it."""
        then = run.query.then
        if type(then) is not Score:
            return None
        try:
            text = self._ids("ids", then.ids)
        except (TypeError, ValueError):
            return None  # a call raises the same
        if self._limits.vocabulary is None or not self._batch._pads(text):
            return None  # a bad id would end the pass, or nobody has a text of this length
        others = [other for other in self._runs if other is not None]
        texts = [o.text for o in others if o.scored is not None or not o.learned]
        if all(o.learned for o in others):
            texts.append(run.longest)
        length = max(self._padded(known) for known in texts)
        return text if self._padded(text) <= length and self._batch._scores(length) else None

    def _to_continue(self, run: Run) -> Plan | None:
        """How a `Generate` is continued that may be with others, and its prompt."""
        then = run.query.then
        if type(then) is not Generate or self._batch._apart:
            return None
        try:
            ids = check_token_ids("ids", then.ids, self._limits, fewest=1)
        except (TypeError, ValueError):
            return None  # a call raises the same
        run.prompt = ids[0].to("cpu", copy=True)
        return Plan.of(then, self._batch.model)

    def _continue(self, waiting: dict[int, Run]) -> None:
        """Continues slots, those with equal options together."""
        alike: dict[tuple[Any, ...], dict[int, Tensor]] = {}
        for slot, run in waiting.items():
            assert run.prompt is not None
            length = len(run.prompt) if self._continuations.refused else None
            alike.setdefault((run.plan, length), {})[slot] = run.prompt
        for (plan, _), prompts in alike.items():
            for part in neighbouring(prompts):
                self._continue_together(part, plan)

    def _continue_together(self, prompts: dict[int, Tensor], plan: Plan) -> None:
        if len(prompts) > self._continuations.most:
            slots = list(prompts)
            for half in (slots[: len(slots) // 2], slots[len(slots) // 2 :]):
                self._continue_together({slot: prompts[slot] for slot in half}, plan)
            return
        made: dict[int, Tensor] = {}
        error: Exception | None = None
        if len(prompts) > 1:
            try:
                made = self._continuations.together(prompts, plan, self._limits.positions)
            except _OUT_OF_MEMORY as lacking:
                clear_locals(lacking)
                self._continuations.most = len(prompts) // 2
                self._continue_together(prompts, plan)
                return
            except MODEL_ERRORS as failure:  # perhaps of one prompt: each is called alone
                clear_locals(failure)
            except Exception as failure:  # perhaps a signal's
                error = failure
        for slot in prompts:
            run = self._runs[slot]
            assert run is not None
            if error is None:
                run.made = made.get(slot)
                self._finish(slot, run)
            else:
                self._end(slot, run, Answer(run.index, None, (), error))

    def _finish(self, slot: int, run: Run, may_wait: bool = False) -> None:
        """Makes the answer of a query that has learned. With `may_wait` it may wait for others."""
        value: Any = None
        error: Exception | None = None
        losses: tuple[float, ...] = ()
        try:
            if may_wait:
                run.scored, run.plan = self._to_score(run), self._to_continue(run)
                if run.scored is not None or run.plan is not None:
                    return
            for results in run.results:
                results.fetch()
            losses = run.losses(slot)
            if run.score is not None:
                run.score.fetch()
                value = finite_score(run.score.losses[slot])
            elif run.made is not None:
                value = run.made
            elif run.query.then is not None:
                with self._batch.slot(slot) as model:
                    value = run.query.then(model)
        except BaseWritten:
            raise  # other queries would go on with another base
        except Exception as failure:
            clear_locals(failure)  # they may hold a pass's tensors
            error = failure
        self._end(slot, run, Answer(run.index, value, losses, error))

    def _end(self, slot: int, run: Run, answer: Answer) -> None:
        self._answers[run.index] = answer
        if answer.error is not None or not self._keep:
            self._stale.append(slot)  # first: a signal may come meanwhile
        self._runs[slot] = None
        run.forget()
        if not self._keep:
            self._free.append(slot)

    def _reset(self) -> None:
        if self._stale:
            self._batch._reset(self._stale)
            self._stale = []

    def close(self) -> None:
        """Resets the slots of queries that were not finished."""
        for slot, run in enumerate(self._runs):
            if run is not None:
                self._stale.append(slot)
                self._runs[slot] = None
        self._reset()
