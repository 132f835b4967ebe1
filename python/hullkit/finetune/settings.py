# SPDX-License-Identifier: Apache-2.0
"""The settings of a `TestTimeFinetuner`, checked as a query reads them."""

from __future__ import annotations

from typing import Any, NamedTuple

from .._checks import check_betas, check_choice, check_finite, check_int
from ..language_model.loss import PRECISIONS
from .activations import CHOICES
from .rounding import ROUNDINGS


class Settings(NamedTuple):
    """The arguments of `TestTimeFinetuner` that a query reads; they are explained there."""

    lr: float
    refresh_interval: int
    mode: str
    betas: tuple[float, float]
    eps: float
    precision: str
    capture: bool | None
    compile: bool
    snapshot: str
    rounding: str
    seed: int
    fuse: bool
    activations: str

    def checked(self) -> Settings:
        """The same with numbers as floats. Raises TypeError, ValueError: a bad one, named."""
        lr = check_finite("lr", self.lr)
        check_int("refresh_interval", self.refresh_interval, 1)
        check_choice("mode", self.mode, ("reuse", "accumulate"))
        betas = check_betas(self.betas)
        eps = check_finite("eps", self.eps)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("snapshot", self.snapshot, ("device", "host"))
        check_choice("rounding", self.rounding, ROUNDINGS)
        check_choice("capture", self.capture, (None, True, False))
        check_choice("compile", self.compile, (True, False))
        check_choice("fuse", self.fuse, (True, False))
        check_choice("activations", self.activations, CHOICES)
        check_int("seed", self.seed, 0, (1 << 63) - 1)
        if self.compile and self.activations == "recompute":
            raise ValueError(
                "activations: expected 'auto' or 'keep' for compile=True, got 'recompute'"
            )
        if self.capture and self.mode == "accumulate":
            raise ValueError("capture: expected None or False for mode='accumulate', got True")
        return self._replace(lr=lr, betas=betas, eps=eps)

    @property
    def of_loss(self) -> tuple[Any, ...]:
        """What the loss of a model is made for."""
        return self.precision, self.compile, self.fuse

    @property
    def of_graphs(self) -> tuple[Any, ...]:
        """What recorded passes and their memory are made for."""
        return *self.of_loss, self.activations, self.snapshot, self.rounding, self.seed
