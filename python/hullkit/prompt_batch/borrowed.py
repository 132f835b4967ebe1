# SPDX-License-Identifier: Apache-2.0
"""A block that changes how a model runs, and gives it back as it was."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from threading import RLock
from typing import Any

import torch
from torch import nn

from ..finetune.snapshot import Attributes, put_back, set_training
from ..language_model.quantized_layouts import FirstLayouts
from ..language_model.torch_settings import TorchSettings
from ..native.kernels import DictCopies, WithBlock


class _Shortcut:
    """torch's setting for encoder layers, which all threads share: off while a block is open."""

    def __init__(self) -> None:
        self._open: set[int] = set()
        # Held for a few statements of a with-block, which a signal's error leaves too. The signal's
        # handler may open a block of its own.
        self._lock = RLock()
        self._before = True

    def forbid(self, block: object) -> None:
        with self._lock:
            if not self._open:
                self._before = torch.backends.mha.get_fastpath_enabled()
            self._open.add(id(block))
            torch.backends.mha.set_fastpath_enabled(False)

    def allow(self, block: object) -> None:
        """May be called again, and for a block that forbade nothing."""
        with self._lock:
            if id(block) in self._open:
                if len(self._open) == 1:
                    torch.backends.mha.set_fastpath_enabled(self._before)
                self._open.discard(id(block))


_SHORTCUT = _Shortcut()


# What passes replace in modules: `SlotForwards` and `stand_ins`.
_REPLACED = ("forward", "_loss_function")


def _replaceable(module: nn.Module) -> tuple[object, ...]:
    own = module.__dict__
    return own.get("forward"), own.get("_loss_function")


class Borrowed(WithBlock):
    """Inside the block the model is in eval mode, and no parameter gets a gradient. It yields it.

    Quantised weights have one layout. torch's encoder layers take no shortcut past the forwards
    of their parts, which may be a slot's.

    stretched: modules that keep the longest text so far; their buffers, which they replace, and
    attributes are as before after the block.
    inner: blocks that lie within this one. A signal's handler may cut one of them short as it is
    left. So this block, which `WithBlock` leaves to the end, puts back what passes replace in
    modules and torch's settings, too.
    """

    def __init__(
        self, model: nn.Module, stretched: list[nn.Module], *inner: AbstractContextManager[Any]
    ) -> None:
        super().__init__()
        self._model = model
        self._stretched = stretched
        self._kept: tuple[DictCopies, Attributes] | None = None
        self._inner = inner
        self._stack = ExitStack()
        self._modules: list[tuple[nn.Module, bool, tuple[object, ...]]] = []
        self._trained: list[tuple[nn.Parameter, bool]] = []
        self._layouts = FirstLayouts()
        self._settings: TorchSettings | None = None

    @property
    def modules(self) -> list[nn.Module]:
        """The model's, once the block is open: the model first."""
        return [module for module, _, _ in self._modules]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter, _ in self._trained]

    def with_inner(self, block: AbstractContextManager[Any]) -> Borrowed:
        """Adds a block that lies within all others. Returns this one."""
        self._inner = (*self._inner, block)
        return self

    def _claim(self) -> None:
        self._settings = TorchSettings()
        modules = self._model.modules()
        self._modules = [(m, m.training, _replaceable(m)) for m in modules]
        self._trained = [(p, p.requires_grad) for p in self._model.parameters()]
        self._layouts.take(module for module, _, _ in self._modules)
        buffers = DictCopies([module._buffers for module in self._stretched])
        self._kept = buffers, Attributes(self._stretched)

    def _enter(self) -> nn.Module:
        _SHORTCUT.forbid(self)
        for module, training, _ in self._modules:
            if training:
                set_training(module, False)
        for parameter, _ in self._trained:
            parameter.requires_grad_(False)
        for block in self._inner:
            self._stack.enter_context(block)
        return self._model

    def _leave(self) -> None:
        """Begins again where it was cut short: the stack forgets a block as it leaves it."""
        self._stack.close()
        for module, training, own in self._modules:
            if module.training is not training:
                set_training(module, training)
            if _replaceable(module) != own:
                for name, value in zip(_REPLACED, own, strict=True):
                    module.__dict__.pop(name, None)
                    if value is not None:
                        module.__dict__[name] = value
        for parameter, trained in self._trained:
            parameter.requires_grad_(trained)
        self._layouts.put_back()
        if self._kept is not None:
            buffers, attributes = self._kept
            put_back(buffers)
            attributes.restore()
        _SHORTCUT.allow(self)
        if self._settings is not None:
            self._settings.put_back()
