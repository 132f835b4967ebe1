# SPDX-License-Identifier: Apache-2.0
"""What queries may find changed in a batch, and what its slots were made for."""

from __future__ import annotations

from torch import nn

from .._checks import check_finite, check_int


class Settings:
    """Of a `PromptBatch`. Only what has a setter may be changed."""

    _model: nn.Module
    _slots: int
    _rank: int
    _alpha: float
    _rslora: bool
    _refresh_interval: int

    @property
    def model(self) -> nn.Module:
        return self._model

    @property
    def slots(self) -> int:
        return self._slots

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def alpha(self) -> float:
        return self._alpha

    @property
    def rslora(self) -> bool:
        return self._rslora

    @property
    def refresh_interval(self) -> int:
        return self._refresh_interval

    @property
    def lr(self) -> float:
        """The learning rate of queries that have none of their own."""
        return self._lr

    @lr.setter
    def lr(self, lr: float) -> None:
        self._lr = check_finite("lr", lr)

    @property
    def seed(self) -> int:
        """The seed of the factors of queries that have none of their own."""
        return self._seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self._seed: int = check_int("seed", seed, 0, (1 << 63) - 1)
