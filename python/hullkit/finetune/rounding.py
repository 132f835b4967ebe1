# SPDX-License-Identifier: Apache-2.0
"""Rounding of half-precision parameters, and the optimizer of eager passes."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._tensors import HALVES
from ..optim.adam import Adam

ROUNDINGS = ("stochastic", "nearest")


class Rounding(NamedTuple):
    """How updated parameters are rounded.

    stochastic: up or down at random in proportion; otherwise to nearest.
    salts: 32 bits for each parameter, by its id. They are made of its name, so that its noise does
        not depend on which others are trained.
    """

    stochastic: bool
    seed: int
    salts: dict[int, int]


def rounding_of(model: nn.Module, kind: str, seed: int) -> Rounding:
    salts = {id(p): zlib.crc32(name.encode()) for name, p in model.named_parameters()}
    return Rounding(kind == "stochastic", seed, salts)


def moment_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of Adam's moments. It is never float16, in which a square below 6e-8 is 0."""
    return torch.bfloat16 if dtype in HALVES else dtype


class RoundingAdam(Adam):
    """Adam whose noise and moments depend on a query's parameters.

    tensors: updated; each is the parameter at its place, or holds that parameter's values.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        parameters: Sequence[nn.Parameter],
        rounding: Rounding,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        pairs = zip(tensors, parameters, strict=True)
        self._salts = {id(tensor): rounding.salts[id(p)] for tensor, p in pairs}
        stochastic = rounding.stochastic and any(t.dtype in HALVES for t in tensors)
        super().__init__(
            tensors, lr, betas, eps, stochastic_rounding=stochastic, seed=rounding.seed
        )

    def _salt(self, place: int, param: Tensor) -> int:
        return self._salts[id(param)]

    def _state_dtype(self, param: Tensor) -> torch.dtype:
        return moment_dtype(param.dtype)
