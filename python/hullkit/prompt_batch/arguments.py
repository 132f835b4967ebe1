# SPDX-License-Identifier: Apache-2.0
"""The arguments of a `PromptBatch` as its attributes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .._checks import check_int, check_positive
from ..finetune.settings import CHECKS, one_of


class BatchArguments:
    """Checked as they are set. Once the slots are made, `lr` and `seed` alone may be."""

    model: nn.Module
    slots: int
    memory: int | float | None
    rank: int
    alpha: float
    rslora: bool
    target: str | Sequence[str]
    lr: float
    refresh_interval: int
    betas: tuple[float, float]
    eps: float
    precision: str
    capture: bool | None
    seed: int
    backend: str | None
    _made = False

    def __setattr__(self, name: str, value: Any) -> None:
        if self._made and name in _OF_SLOTS:
            raise AttributeError(
                f"{name}: expected the value that the slots were made for to stay; make a new "
                "PromptBatch for another"
            )
        check = _CHECKS.get(name)
        super().__setattr__(name, value if check is None else check(value))


def check_slot(k: int, slots: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k: expected an int, got {type(k).__name__} ({k!r})")
    if not 0 <= k < slots:
        raise IndexError(f"k: expected a slot in [0, {slots}), got {k}")


_OF_SLOTS = BatchArguments.__annotations__.keys() - {"lr", "seed"}
# `memory`, `target` and `backend` are checked with the model's layers and their device.
_CHECKS = {name: CHECKS[name] for name in CHECKS.keys() & BatchArguments.__annotations__.keys()} | {
    "rank": lambda value: check_int("rank", value, 1),
    "alpha": lambda value: check_positive("alpha", value),
    "rslora": one_of("rslora", (True, False)),
}
