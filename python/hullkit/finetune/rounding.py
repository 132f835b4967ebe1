"""How half-precision parameters of a query are rounded, and the optimizer of eager passes."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..optim._tensor_table import HALVES
from ..optim.adam import Adam

ROUNDINGS = ("stochastic", "nearest")


class Rounding(NamedTuple):
    """stochastic: up or down at random in proportion; else to nearest. salts: by id of a parameter,
    from its name: its noise does not depend on what else is trained."""

    stochastic: bool
    seed: int
    salts: dict[int, int]


def rounding_of(model: nn.Module, kind: str, seed: int) -> Rounding:
    salts = {id(p): zlib.crc32(name.encode()) for name, p in model.named_parameters()}
    return Rounding(kind == "stochastic", seed, salts)


def moment_dtype(dtype: torch.dtype) -> torch.dtype:
    """Adam's moments of parameters of this dtype: never float16, where a square below 6e-8 is 0."""
    return torch.bfloat16 if dtype in HALVES else dtype


class RoundingAdam(Adam):
    """Adam over a query's parameters, or over tensors that stand for them."""

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
