# SPDX-License-Identifier: Apache-2.0
"""Readers of one input whose gradient goes through somebody's function, beside plain LoRA."""

from __future__ import annotations

from typing import Any

import hullkit
import pytest
import torch
import torch.nn.functional as F
from _models import VOCABULARY
from _prompts import DEVICE, PRECISIONS, ROUNDING, text
from torch import Tensor, nn

pytestmark = [pytest.mark.usefixtures("one_thread")]
if DEVICE.type == "cuda":
    pytestmark += [pytest.mark.gpu]

WIDTH, UPDATES, LR, RANK = 16, 24, 1e-2, 4


class Reversed(torch.autograd.Function):
    """Gradient reversal, as it is mostly written."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class TwoReaders(nn.Module):
    """`second` reads what `first` reads, or a view of it made in some way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.inner = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.way = way
        if way == "hook":
            self.second.register_full_backward_hook(lambda module, into, out: (-into[0],))

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.inner(self.embedding(ids)))
        if self.way == "first without gradients":
            with torch.no_grad():
                a = torch.sigmoid(self.first(x))
            out: Tensor = self.head(a * torch.tanh(self.second(x)))
            return out
        a = self.first(x)
        if self.way == "function":
            x = Reversed.apply(x)  # type: ignore[no-untyped-call]
        elif self.way == "view of a function":
            x = Reversed.apply(x).view(-1, WIDTH).view(x.shape)  # type: ignore[no-untyped-call]
        elif self.way == "function of a view":
            x = Reversed.apply(x.view(-1, WIDTH)).view(x.shape)  # type: ignore[no-untyped-call]
        elif self.way == "view":
            x = x.view(-1, WIDTH).unsqueeze(0).squeeze(0).view(x.shape)
        out = self.head(torch.tanh(a) + torch.tanh(self.second(x)))
        return out


class Plain(nn.Module):
    """A linear layer with its factors, as autograd sees it."""

    def __init__(self, layer: nn.Linear, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.layer, self.scale = layer, scale
        self.a, self.b = (nn.Parameter(factor.clone()) for factor in (a, b))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) + self.scale * (x @ self.a.t()) @ self.b.t()
        return out


WAYS = ("function", "view of a function", "function of a view", "hook", "view")
WAYS += ("first without gradients",)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("way", WAYS)
def test_losses_are_those_of_plain_lora(way: str, precision: str) -> None:
    ids = text(12, 3)
    target = ["inner", "first", "second"]
    options: dict[str, Any] = {"rank": RANK, "alpha": 8, "lr": LR, "target": target}
    options |= {"capture": False, "precision": precision}
    batch = hullkit.PromptBatch(TwoReaders(way).to(DEVICE), slots=1, **options)
    plain: Any = TwoReaders(way).to(DEVICE)
    trained: list[nn.Parameter] = []
    for name, (a, b) in batch._factors.of_slot(0).items():
        layer = Plain(getattr(plain, name), a, b, 8 / RANK)
        hooks = layer.layer._backward_hooks
        layer._backward_hooks, layer.layer._backward_hooks = hooks, type(hooks)()
        layer._is_full_backward_hook = layer.layer._is_full_backward_hook
        setattr(plain, name, layer)
        trained += [layer.a, layer.b]
    adam = torch.optim.Adam(trained, lr=LR)
    losses = []
    for _ in range(UPDATES // 2):
        adam.zero_grad()
        logits = plain(ids.to(DEVICE)[None])[0]
        loss = F.cross_entropy(logits[:-1], ids[1:].to(DEVICE))
        loss.backward()
        losses.append(loss.item())
        adam.step()
        adam.step()
    [answer] = batch.map([hullkit.Query([ids], [UPDATES])])
    assert answer.error is None
    assert answer.losses == pytest.approx(losses, rel=10 * ROUNDING)
    assert losses[-1] < 0.9 * losses[0]
