# SPDX-License-Identifier: Apache-2.0
"""The settings of a `TestTimeFinetuner`, checked as a query reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .._checks import check_betas, check_choice, check_finite, check_int
from ..language_model.loss import PRECISIONS
from .activations import CHOICES
from .rounding import ROUNDINGS


def one_of(name: str, choices: tuple[Any, ...]) -> Callable[[Any], Any]:
    """A check of one argument: it returns the value, or raises ValueError."""

    def check(value: Any) -> Any:
        check_choice(name, value, choices)
        return value

    return check


# Each argument of finetuning by its name: what checks it, and returns it as a plain number.
CHECKS: dict[str, Callable[[Any], Any]] = {
    "lr": lambda value: check_finite("lr", value),
    "refresh_interval": lambda value: check_int("refresh_interval", value, 1),
    "mode": one_of("mode", ("reuse", "accumulate")),
    "betas": check_betas,
    "eps": lambda value: check_finite("eps", value),
    "precision": one_of("precision", PRECISIONS),
    "capture": one_of("capture", (None, True, False)),
    "compile": one_of("compile", (True, False)),
    "snapshot": one_of("snapshot", ("device", "host")),
    "rounding": one_of("rounding", ROUNDINGS),
    "seed": lambda value: check_int("seed", value, 0, (1 << 63) - 1),
    "fuse": one_of("fuse", (True, False)),
    "activations": one_of("activations", CHOICES),
}


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
        """The same with plain numbers. Raises TypeError, ValueError: a bad one, named."""
        own = Settings(**{name: CHECKS[name](value) for name, value in self._asdict().items()})
        if own.compile and own.activations == "recompute":
            raise ValueError(
                "activations: expected 'auto' or 'keep' for compile=True, got 'recompute'"
            )
        if own.capture and own.mode == "accumulate":
            raise ValueError("capture: expected None or False for mode='accumulate', got True")
        return own

    @property
    def of_loss(self) -> tuple[Any, ...]:
        """What the loss of a model is made for."""
        return self.precision, self.compile, self.fuse

    @property
    def of_graphs(self) -> tuple[Any, ...]:
        """What recorded passes and their memory are made for."""
        return *self.of_loss, self.activations, self.snapshot, self.rounding, self.seed
