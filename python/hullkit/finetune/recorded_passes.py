# SPDX-License-Identifier: Apache-2.0
"""Passes of a model that are recorded as CUDA graphs once, and kept for later queries."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import nullcontext
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import nn

from ..language_model.experts import without_questions
from ..language_model.host_constants import HostConstants
from .capture_memory import CaptureMemory, NotCapturable
from .snapshot import Attributes

P = TypeVar("P")


class Allowed(NamedTuple):
    """What a recording may do if the pass as it is cannot be captured.

    constants: watch a model that moves tensors from the host, and record it with copies of them.
    experts: let the model's experts run without questions to the device.
    """

    constants: bool = True
    experts: bool = True


class Recording:
    """One attempt at a pass. It keeps alive what the pass's graph reads: the pass keeps it.

    memory: of all graphs of the model.
    noted: a block around the forward half of a pass before the capture. served: of the captured.
    replaced: names of methods in whose place others run in the pass.
    """

    def __init__(
        self,
        model: nn.Module,
        memory: CaptureMemory,
        constants: HostConstants | None,
        replaced: tuple[str, ...],
    ) -> None:
        self._model = model
        self.memory = memory
        self.noted = nullcontext if constants is None else constants.noted
        self.served = nullcontext if constants is None else constants.served
        self.replaced = replaced

    def graph(self, held: int, body: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """A graph of what `body` launches, as `CaptureMemory.record` makes it."""
        # A model may replace a tensor that it keeps as an attribute; the graph reads the old one.
        self._tables = Attributes(list(self._model.modules())).tensors
        return self.memory.record(held, body)


class RecordedPasses(Generic[P]):
    """Recorded passes by their keys: what their inputs' shapes are. The latest `most` are kept."""

    def __init__(self, model: nn.Module, memory: CaptureMemory, most: int) -> None:
        self._model = model
        self._memory = memory
        self._most = most
        self._passes: OrderedDict[Hashable, P] = OrderedDict()
        self._plain = True  # until the forward pass as it is could not be recorded

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is of a copied model, and records passes of its own."""
        return RecordedPasses, (self._model, self._memory, self._most)

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._passes)

    def __len__(self) -> int:
        return len(self._passes)

    def of(
        self,
        key: Hashable,
        record: Callable[[Recording], P],
        allowed: Callable[[], Allowed] = Allowed,
    ) -> P:
        """The pass of this key: the one that is kept, or what `record` makes, on the stream of
        captures.

        allowed: tells what that may do. It is not asked for a pass that is kept: to look through a
        model with adapters takes longer than a pass.

        Raises NotCapturable; torch.OutOfMemoryError.
        """
        known = self._passes.get(key)
        if known is None:
            while len(self._passes) >= self._most:
                self._passes.popitem(last=False)
            known = self._passes[key] = self._record(record, allowed())
        self._passes.move_to_end(key)
        return known

    def release(self) -> None:
        """Forgets the passes, and their memory."""
        self._passes.clear()
        self._memory.renew()

    def _record(self, record: Callable[[Recording], P], allowed: Allowed) -> P:
        buffers = [dict(module._buffers) for module in self._model.modules()]
        recorded, reason = self._attempt(record, None, False) if self._plain else (None, "")
        if recorded is None and allowed.constants:
            # Watching every operation has a cost: only models that need it pay.
            own = (*self._model.parameters(), *self._model.buffers())
            known = HostConstants(self._memory.stream.device, own)
            recorded, reason = self._attempt(record, known, allowed.experts)
            self._plain = recorded is None
        if recorded is None:
            raise NotCapturable(reason)
        for was, module in zip(buffers, self._model.modules(), strict=True):
            if [*map(id, was.values())] != [*map(id, module._buffers.values())]:
                raise NotCapturable("forward replaces a buffer instead of writing to it")
        return recorded

    def _attempt(
        self, record: Callable[[Recording], P], constants: HostConstants | None, experts: bool
    ) -> tuple[P | None, str]:
        """A recorded pass, or why there is none."""
        others = without_questions(self._model) if experts else nullcontext(())
        try:
            with self._memory.apart(), others as replaced:
                return record(Recording(self._model, self._memory, constants, replaced)), ""
        except BaseException as error:
            self._memory.renew()
            if isinstance(error, torch.OutOfMemoryError):
                raise
            if isinstance(error, TimeoutError) or not isinstance(error, Exception):
                raise  # a signal's
            # The error is not kept: its frames hold tensors, which hold memory of the stream.
            return None, f"{type(error).__name__}: {error}".partition("\n")[0]
