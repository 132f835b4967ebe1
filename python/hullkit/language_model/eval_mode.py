# SPDX-License-Identifier: Apache-2.0
"""A block for forwards that only read a model."""

from __future__ import annotations

import torch
from torch import nn

from ..native.kernels import WithBlock
from .torch_settings import TorchSettings


class EvalMode(WithBlock):
    """Inside the block all modules are in eval mode, and nothing is kept for gradients.

    Flags and torch's settings are as before afterwards, whatever a signal's handler raises at
    whatever moment.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._flags: list[tuple[nn.Module, bool]] = []
        self._settings: TorchSettings | None = None

    def _claim(self) -> None:
        self._settings = TorchSettings()
        self._flags = [(module, module.training) for module in self._model.modules()]

    def _enter(self) -> None:
        torch.set_grad_enabled(False)
        # Not .eval(): a model may override it to do more, such as merging adapters. Nor past
        # `__setattr__`, as in training passes: modules of torch.jit keep their flags elsewhere.
        for module, _ in self._flags:
            module.training = False

    def _leave(self) -> None:
        for module, training in self._flags:
            module.training = training
        if self._settings is not None:
            self._settings.put_back()
