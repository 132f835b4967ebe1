# SPDX-License-Identifier: Apache-2.0
"""Layers that read one input: who they are may change from pass to pass."""

from __future__ import annotations

import gc
from typing import Any

import hullkit
import pytest
import torch
from _models import VOCABULARY
from _prompts import DEVICE, PRECISIONS, ROUNDING, TOGETHER, text
from hullkit.language_model import low_rank_layers
from hullkit.language_model.products import SharedInput
from hullkit.prompt_batch import slot_forwards
from torch import Tensor, nn

pytestmark = [pytest.mark.usefixtures("one_thread")]
if DEVICE.type == "cuda":
    pytestmark += [pytest.mark.gpu]

WIDTH = 24
QUERIES = [hullkit.Query([text(20, i), text(13, 9 + i)], [5, 4]) for i in range(2)]


class Readers(nn.Module):
    """Five layers, whose inputs are one tensor or several, in a mode that changes."""

    def __init__(self, modes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=i % 2 == 0) for i in range(5))
        self.last, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.modes, self.passes = modes, 0

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.embedding(ids)))
        self.passes += torch.is_grad_enabled()
        a, b, c, d, e = self.layers
        mode = self.passes % self.modes
        if mode == 0:
            parts = [layer(x) for layer in self.layers]
        elif mode == 1:
            parts = [layer(x) for layer in (e, d, c, b, a)]
        elif mode == 2:
            y = torch.sin(x)
            parts = [a(x), b(y), c(x), d(y), e(x)]
        elif mode == 3:
            parts = [a(x)]
            parts += [b(parts[0]), c(x), d(parts[0])]
            parts += [e(parts[1])]
        else:  # a copy that changes before its readers
            parts = [a(x)]
            x = x.clone().mul_(0.5)
            parts += [b(x), c(x), d(x.detach()), e(parts[0])]
        logits: Tensor = self.head(self.last(torch.tanh(torch.stack(parts).sum(0))))
        return logits


class Transposed(nn.Module):
    """Its second layer reads a transposed view, as a state-space model's does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        across = self.first(self.embedding(ids)).transpose(1, 2).contiguous()
        logits: Tensor = self.head(torch.tanh(self.second(across.transpose(1, 2))))
        return logits


def losses(model: nn.Module, **options: Any) -> list[tuple[float, ...]]:
    target = [name for name, layer in model.named_modules() if type(layer) is nn.Linear]
    target.remove("head")
    settings: dict[str, Any] = {"slots": 2, "rank": 4, "lr": 1e-2, "capture": False}
    batch = hullkit.PromptBatch(model.to(DEVICE), target=target, **settings | options)
    answers = [*batch.map(QUERIES)]
    assert [answer.error for answer in answers] == [None] * len(QUERIES)
    return [answer.losses for answer in answers]


@pytest.mark.parametrize(("modes", "precision"), [(1, "float32"), (5, "tf32")])
def test_readers_change_no_bit(modes: int, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether layers are known to read one input, and whether what is known is still so."""
    options = {"precision": precision, "backend": "triton"}
    known = losses(Readers(modes), **options)
    shrunk: list[int] = []
    own = slot_forwards.shrink

    def noted(x: Tensor, factors: Any, *others: Any) -> Any:
        shrunk.append(len(factors))
        return own(x, factors, *others)

    for module in (slot_forwards, low_rank_layers):
        monkeypatch.setattr(module, "shrink", noted)
    assert losses(Readers(modes), **options) == known
    assert set(shrunk) == {1, 2, 3}
    monkeypatch.setattr(slot_forwards._Call, "note_readers", lambda call: None)
    shrunk.clear()
    assert losses(Readers(modes), **options) == known
    assert set(shrunk) == {1}
    for ours, theirs in zip(losses(Readers(modes), precision=precision), known, strict=True):
        assert ours == pytest.approx(theirs, rel=ROUNDING)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_input_that_is_a_transposed_view(precision: str) -> None:
    by_both = (
        losses(Transposed(), precision=precision, backend=backend) for backend in (None, "triton")
    )
    for ours, theirs in zip(*by_both, strict=True):
        assert ours == pytest.approx(theirs, rel=ROUNDING)


class Lost(torch.autograd.Function):
    """x, whose backward half is out of memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("of this test's model")


class Losing(Readers):
    """One reader's gradient is there when memory is out on the way to another's."""

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.embedding(ids)))
        other = Lost.apply(self.layers[0](x))  # type: ignore[no-untyped-call]
        logits: Tensor = self.head(self.last(torch.sin(other) + self.layers[1](x)))
        return logits


def test_a_pass_that_fails_leaves_no_tensors() -> None:
    """At once: the next pass needs the memory."""
    target = ["first", "layers.0", "layers.1"]
    batch = hullkit.PromptBatch(
        Losing(1).to(DEVICE), slots=2, rank=4, capture=False, target=target, **TOGETHER
    )
    gc.collect()
    gc.disable()
    try:
        answers = [*batch.map(QUERIES)]
        alive = [thing for thing in gc.get_objects() if type(thing) is SharedInput]
    finally:
        gc.enable()
    assert {type(answer.error) for answer in answers} == {torch.OutOfMemoryError}
    assert alive == []


class Router(nn.Module):
    """A layer that sees texts of tokens, and one that sees tokens, as routers of experts do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.up, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4, bias=False)
        self.experts = nn.Parameter(torch.randn(4, WIDTH))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        y = self.up(x)
        chosen = self.gate(x.reshape(-1, WIDTH)).softmax(dim=1)
        return self.head(x + y + (chosen @ self.experts).view_as(x))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_readers_of_one_input_in_two_shapes(precision: str) -> None:
    """From the second pass on the second reader is computed with the first, if it may be."""
    model = Router().to(DEVICE)
    batch = hullkit.PromptBatch(
        model, slots=1, rank=4, target=["up", "gate"], precision=precision, lr=1e-2
    )
    ids = text(20, 1)
    wanted = hullkit.PromptBatch(
        model, slots=1, rank=4, target=["up", "gate"], precision=precision, lr=1e-2
    ).adapt_([hullkit.Query([ids], [1])])[0].losses  # fmt: skip
    for _ in range(3):
        [answer] = batch.adapt_([hullkit.Query([ids], [1])])
        assert answer.losses == wanted
    base = nn.functional.cross_entropy(model(ids[None].to(DEVICE))[0, :-1], ids[1:].to(DEVICE))
    rounding = 1e-5 if precision == "float32" else 0.02
    assert wanted == pytest.approx([base.item()], rel=rounding)
