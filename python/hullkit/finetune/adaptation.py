# SPDX-License-Identifier: Apache-2.0
"""The with-block: it runs a query on entry and, whatever happens, restores the model."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..language_model.caches import CachesOff
from ..language_model.quantized_layouts import FirstLayouts
from ..language_model.torch_settings import TorchSettings
from ..native.kernels import WithBlock
from .base_weights import Weights
from .frozen_writes import check_unwritten, forbid_merging
from .report import AdaptReport, Clock
from .snapshot import Snapshot, set_training, tensors_of


class Query(Protocol):
    """The finetuning that happens on entry, between the snapshot and the body of the block."""

    snapshot_place: str  # "device" or "host"

    def prepare(self, parameters: list[nn.Parameter], buffers: list[Tensor]) -> Weights | None:
        """Before the snapshot; returns what keeps base values, if not the snapshot itself."""

    def run(self, snapshot: Snapshot, clock: Clock) -> AdaptReport:
        """Finetunes the model in place."""

    def release(self) -> None:
        """Forgets recorded passes."""


class KeepsReport(Protocol):
    """The owner of the latest query's report."""

    last_report: AdaptReport | None


class Adaptation(WithBlock):
    """One with-block of `TestTimeFinetuner.adapted`: snapshot, query, the user's code, way back.

    A signal's handler may raise at any moment. If it does so between the call of `__exit__` and its
    first line, no try can catch that. So `__enter__` and `__exit__` are functions of C++, which
    call the methods below. `_enter` and the block get signals at once. `_claim` and `_leave` run
    with signals held back. If another error cuts `_leave` short, it is called again until it
    returns.
    """

    def __init__(self, model: nn.Module, query: Query, owner: KeepsReport) -> None:
        super().__init__()
        self._model = model
        self._query = query
        self._owner = owner
        self._claimed: list[nn.Module] = []
        self._claimed_memory: list[int] = []
        self._layouts = FirstLayouts()
        self._caches = CachesOff()
        self._key = weakref.ref(self)  # whoever is refused can see whether somebody can leave
        self._keeping = self._kept = False
        self._settings: TorchSettings | None = None
        self._snapshot: Snapshot | None = None
        self._report: AdaptReport | None = None
        self._timed = False
        self._clock: Clock | None = None
        self._failure: Exception | None = None
        self._written: list[Tensor] = []

    def keep(self) -> None:
        """Enters, and leaves trained weights and buffers as the passes left them.

        After an error they are as before, whenever it comes: Python hears no signal between the end
        of the `try` and the next line of the caller.
        """
        self._keeping = True
        try:
            with self:
                self._kept = True
        except BaseException:
            self._kept = False
            self.__exit__()
            self._owner.last_report = None
            raise

    def _claim(self) -> None:
        # All modules are claimed, since a wrapper or a part of the model shares its weights. They
        # are claimed in one order: if two adaptations begin together, one of them gets all.
        self._claimed = list(self._model.modules())
        for module in sorted(self._claimed, key=id):
            owner = _OWNERS.setdefault(module, self._key)
            if owner is not self._key:
                raise RuntimeError(
                    "adapted(): expected a model that is not being adapted, got one inside an "
                    "adapted() block of this tuner or of one that shares modules with it"
                    f"{_end(owner)}"
                )
        # Other modules may have the same weights. What is read alone may be read by others, too.
        trained = {p.data_ptr(): module for module in self._claimed for p in _trained(module)}
        self._claimed_memory = sorted(trained)
        for address in self._claimed_memory:
            mine = (self._key, weakref.ref(trained[address]))
            owner, held_by = _OWNERS_OF_MEMORY.setdefault(address, mine)
            if held_by() is None:  # a block that nobody has left; other weights are there by now
                _OWNERS_OF_MEMORY[address] = mine
            elif owner is not self._key:
                raise RuntimeError(
                    "adapted(): expected a model whose trained weights are not being adapted, got "
                    f"one that shares some with a model inside an adapted() block{_end(owner)}"
                )
        self._layouts.take(self._claimed)

    def _enter(self) -> nn.Module:
        query, owner = self._query, self._owner
        owner.last_report = None
        self._settings = TorchSettings()
        clock = Clock(_device(self._model))
        with torch.inference_mode(False), torch.enable_grad(), _without_autocast(self._model):
            parameters, buffers = tensors_of(self._claimed)
            weights = query.prepare(parameters, buffers)
            # Nothing of the model is written before the snapshot is complete.
            self._snapshot = snapshot = Snapshot(
                self._claimed, parameters, buffers, query.snapshot_place, weights
            )
            for module in self._claimed:
                # Not .eval(): a model may override it to do more, such as merging adapters.
                if module.training:
                    set_training(module, False)
            snapshot.drop_gradients()
            self._caches.take(self._model)
            report = query.run(snapshot, clock)
            self._caches.put_back()
            if written := snapshot.take_written():
                query.release()  # graphs would write again, and tell nobody
                check_unwritten(self._model, written)
        torch.clear_autocast_cache()  # the caller's autocast has cast the base weights
        self._settings = None  # no torch setting was left behind; the block may set its own
        if not self._keeping:
            forbid_merging(self._claimed, is_adapted)
        owner.last_report = self._report = report
        self._timed = True
        return self._model

    def _leave(self) -> None:
        """Undoes _claim and _enter, as far as they got."""
        if self._settings is None:
            # An error may cut a context manager of the restoring, too.
            self._settings = TorchSettings()
        if self._timed:
            self._timed = False
            with suppress(RuntimeError):  # the device is lost; the restoring will raise
                self._clock = Clock(_device(self._model))
        if self._snapshot is not None and self._kept:
            self._kept = False  # if this is called again, there was an error
            self._failure = self._snapshot.restore_all_but_values()
        elif self._snapshot is not None:
            self._failure = self._snapshot.restore()
            self._written += self._snapshot.take_written()
            self._snapshot = None
        torch.clear_autocast_cache()  # and in the block the adapted ones
        self._caches.put_back()
        self._layouts.put_back()
        for module in self._claimed:
            if _OWNERS.get(module) is self._key:
                _OWNERS.pop(module, None)
        for address in self._claimed_memory:
            if _OWNERS_OF_MEMORY.get(address, (None,))[0] is self._key:
                _OWNERS_OF_MEMORY.pop(address, None)
        self._settings.put_back()
        clock, self._clock = self._clock, None
        failure, self._failure = self._failure, None
        written, self._written = self._written, []
        if failure is not None:
            raise failure
        check_unwritten(self._model, written)
        if clock is not None:
            self._report_restore(clock)

    def _report_restore(self, clock: Clock) -> None:
        report = self._report
        # The model is free by now: another thread may have begun another query.
        if report is None or self._owner.last_report is not report:
            return
        clock.lap("restore")
        seconds = report.seconds._replace(restore=clock.seconds()["restore"])
        self._owner.last_report = report._replace(seconds=seconds)


def _without_autocast(model: nn.Module) -> AbstractContextManager[Any]:
    """The caller's autocast would reach the products of backward halves."""
    kind = _device(model).type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


# The adaptation that a module is part of. There is no lock, since a signal could leave one locked:
# each claim is a single operation of the dictionary.
_Key = weakref.ref[Adaptation]
_OWNERS: weakref.WeakKeyDictionary[nn.Module, _Key] = weakref.WeakKeyDictionary()
# The same of trained weights, by their addresses, with a module that had the weight. torch swaps no
# tensor for another that somebody refers to weakly.
_OWNERS_OF_MEMORY: dict[int, tuple[_Key, weakref.ref[nn.Module]]] = {}


def _end(owner: _Key) -> str:
    """What the error says of a block that was entered by hand and is gone."""
    if owner() is not None:
        return ""
    return ". That block was dropped, and the base weights with it: load the model anew"


def is_adapted(module: nn.Module) -> bool:
    """Whether the module is inside an adapted() block."""
    return module in _OWNERS


def _trained(module: nn.Module) -> list[Tensor]:
    """A module's own trained parameters that have memory."""
    own = [p for p in module._parameters.values() if type(p) in (Tensor, nn.Parameter)]
    return [p for p in own if p is not None and p.requires_grad and p.numel() and not p.is_meta]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
