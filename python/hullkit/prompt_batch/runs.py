# SPDX-License-Identifier: Apache-2.0
"""Queries on their way through slots, and what passes found."""

from __future__ import annotations

import math
from traceback import clear_frames

from torch import Tensor

from ..finetune.schedule import Reuse
from .generation import Plan
from .queries import Query


def clear_locals(error: BaseException | None) -> None:
    """Frees what an error's functions held, but for those that still run."""
    met: set[int] = set()
    while error is not None and id(error) not in met:
        met.add(id(error))
        clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


class Results:
    """Each slot's loss of a pass, and whether a gradient was not finite.

    They stay on the device until `fetch`.

    left_out: the layers that took no part in the pass.
    """

    def __init__(self, losses: Tensor, broken: Tensor, left_out: tuple[str, ...]) -> None:
        self.left_out = left_out
        self._on_device: tuple[Tensor, Tensor] | None = (losses, broken)
        self.losses: list[float] = []
        self.broken: list[int] = []

    def fetch(self) -> None:
        """Waits for the pass. It needs no memory of the device."""
        if self._on_device is not None:
            self.losses, self.broken = (tensor.tolist() for tensor in self._on_device)
            self._on_device = None


class Run:
    """One query on its way: checked examples, its bursts, and how far it is."""

    def __init__(self, index: int, query: Query, texts: list[Tensor], bursts: list[Reuse]) -> None:
        self.index = index
        self.query = query
        self.lr = 0.0
        self._texts = texts
        self._bursts = bursts
        self.updates = 0  # so far
        self.results: list[Results] = []
        self.scored: Tensor | None = None  # once it has learned: the ids whose loss a pass computes
        self.score: Results | None = None  # of that pass
        # Once it has learned, if it may be continued with others: how, its prompt, and the result.
        self.plan: Plan | None = None
        self.prompt: Tensor | None = None
        self.made: Tensor | None = None

    @property
    def num_steps(self) -> int:
        """Updates of the next pass."""
        return 0 if self.scored is not None else self._bursts[len(self.results)].num_steps

    @property
    def text(self) -> Tensor:
        """The ids (T,) of the next pass."""
        if self.scored is not None:
            return self.scored
        return self._texts[self._bursts[len(self.results)].example]

    @property
    def longest(self) -> Tensor:
        return max((self._texts[burst.example] for burst in self._bursts), key=len)

    @property
    def learned(self) -> bool:
        """Whether it has learned all."""
        return len(self.results) == len(self._bursts)

    def note(self, results: Results) -> Exception | None:
        """Takes the results of a pass. Returns why the query cannot go on.

        Adam would leave a layer as it is that takes no part, and count its updates apart. Slots
        have one count for all layers.
        """
        if self.scored is not None:
            self.score = results
            return None
        first = self.results[0] if self.results else results
        if first.left_out != results.left_out:
            example = self._bursts[len(self.results)].example
            [name, *_] = set(first.left_out) ^ set(results.left_out)
            took, takes = "left it out", "uses it"
            if name in results.left_out:
                took, takes = "used it", "leaves it out"
            return RuntimeError(
                f"{name}: expected a layer that takes part in all passes of a query or in none, "
                f"got one where examples[{example}] {takes} and an earlier pass {took}; choose "
                "other layers by `target`"
            )
        self.updates += self.num_steps
        self.results.append(results)
        return None

    def forget(self) -> None:
        """What it is done with. Frames that lead to a kept error may hold this object."""
        self.query, self._texts, self.results = Query((), ()), [], []
        self.scored = self.score = self.prompt = self.made = None

    def losses(self, slot: int) -> tuple[float, ...]:
        """Each pass's loss. Raises FloatingPointError if one or its gradient is not finite."""
        for burst, results in zip(self._bursts, self.results, strict=True):
            value = results.losses[slot]
            if results.broken[slot] or not math.isfinite(value):
                what = "gradient that is not finite" if math.isfinite(value) else f"loss {value}"
                raise FloatingPointError(
                    f"examples[{burst.example}]: expected a finite loss and gradient, got a {what}"
                )
        return tuple(results.losses[slot] for results in self.results)
