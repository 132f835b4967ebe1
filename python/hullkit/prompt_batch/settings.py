# SPDX-License-Identifier: Apache-2.0
"""What queries may find changed in a batch, and what its slots were made for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .._checks import check_betas, check_choice, check_finite, check_int, check_positive
from ..language_model.loss import PRECISIONS


class Settings:
    """Of a `PromptBatch`. Only what has a setter may be changed: the rest is built into slots."""

    _slots: int

    def __init__(
        self,
        model: nn.Module,
        *,
        memory: int | float | None,
        rank: int,
        alpha: float,
        rslora: bool,
        target: str | Sequence[str],
        lr: float,
        refresh_interval: int,
        betas: tuple[float, float],
        eps: float,
        precision: str,
        capture: bool | None,
        seed: int,
        backend: str | None,
    ) -> None:
        self._model = model
        self._memory = memory  # checked with the device, as are `target` and `backend`
        self._rank: int = check_int("rank", rank, 1)
        self._alpha = check_positive("alpha", alpha)
        check_choice("rslora", rslora, (True, False))
        self._rslora = rslora
        self._target = target
        self.lr = lr
        self._refresh_interval: int = check_int("refresh_interval", refresh_interval, 1)
        self._betas = check_betas(betas)
        self._eps = check_finite("eps", eps)
        check_choice("precision", precision, PRECISIONS)
        self._precision = precision
        check_choice("capture", capture, (None, True, False))
        self._capture = capture
        self.seed = seed
        self._backend = backend

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
    def target(self) -> str | Sequence[str]:
        return self._target

    @property
    def memory(self) -> int | float | None:
        return self._memory

    @property
    def betas(self) -> tuple[float, float]:
        return self._betas

    @property
    def eps(self) -> float:
        return self._eps

    @property
    def precision(self) -> str:
        return self._precision

    @property
    def capture(self) -> bool | None:
        return self._capture

    @property
    def backend(self) -> str | None:
        return self._backend

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
