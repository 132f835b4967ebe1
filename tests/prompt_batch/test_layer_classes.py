# SPDX-License-Identifier: Apache-2.0
"""Which subclasses of `torch.nn.Linear` get factors: those whose forward is shown to be its."""

from __future__ import annotations

from typing import Any

import hullkit
import pytest
import torch
from _models import VOCABULARY
from _prompts import DEVICE, batch_of, text
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []


class Inherits(nn.Linear):
    pass


class Spells(nn.Linear):  # as Falcon's: a half is rounded twice
    def forward(self, input: Tensor) -> Tensor:
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


class DropsOut(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(input), 0.1, self.training)


class Routes(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        return super().forward(input), input


class Clips(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class RoundsInputs(nn.Linear):  # to 8 bits
    def forward(self, input: Tensor) -> Tensor:
        scale = input.abs().amax(-1, keepdim=True) / 127
        return super().forward((input / scale).round() * scale)


class Fails(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        raise ValueError("expected two inputs")


class Adapter(nn.Linear):  # fresh: what it adds is 0
    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.b = nn.Parameter(torch.zeros_like(self.weight))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input @ self.b.T


class Model(nn.Module):
    def __init__(self, kind: type[nn.Linear], bias: bool = True, plain: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 12)
        self.inner, self.head = kind(12, 12, bias=bias), nn.Linear(12, VOCABULARY)
        if not plain:
            self.head = kind(12, VOCABULARY, bias=bias)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.inner(self.embedding(ids)))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [Inherits, Spells, DropsOut])
def test_a_class_that_computes_the_product(
    kind: type[nn.Linear], bias: bool, dtype: torch.dtype
) -> None:
    """It learns what `nn.Linear` learns, and its check draws no random numbers of the caller's."""
    query = hullkit.Query([text(9, 0)], [3])
    found = []
    for each in (kind, nn.Linear):
        model = Model(each, bias).to(DEVICE, dtype)
        state = torch.get_rng_state()
        batch = batch_of(model, 1, target=["inner"], capture=False)
        assert torch.equal(torch.get_rng_state(), state)
        assert model.inner.training
        [answer] = batch.map([query])
        assert answer.error is None
        found.append(answer.losses)
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind", [Routes, Clips, RoundsInputs, Fails, Adapter, NonDynamicallyQuantizableLinear]
)
def test_a_class_that_does_something_else_is_refused(
    kind: type[nn.Linear], dtype: torch.dtype
) -> None:
    """The error names another target where there is one."""
    for plain, told in ((True, "'inner'. `target` may name others, as 'head'"), (False, "'inner'")):
        with pytest.raises(ValueError, match="model: expected linear layers that compute") as error:
            batch_of(Model(kind, plain=plain).to(DEVICE, dtype), 1)
        assert str(error.value).endswith(f"{kind.__qualname__}: {told}")
