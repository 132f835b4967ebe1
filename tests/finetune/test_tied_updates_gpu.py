# SPDX-License-Identifier: Apache-2.0
"""Updates of a matrix that is both embedding and last layer: begun early, with the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _models import COUNTS, distance, gpt2, llama, state, texts
from hullkit.finetune import TestTimeFinetuner, capture_memory, grouped_updates
from torch import Tensor, nn

pytestmark = [pytest.mark.gpu, pytest.mark.plain_memory]


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the ids with which early updates were recorded."""
    shapes = []
    own = grouped_updates.GroupedUpdates.early

    def early(self: Any, gradient: Tensor, ids: Tensor) -> None:
        if self._tied is not None:
            shapes.append(ids.shape)
        own(self, gradient, ids)

    monkeypatch.setattr(grouped_updates.GroupedUpdates, "early", early)
    return shapes


def tied_llama() -> nn.Module:
    model = llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


def adapted(model: nn.Module, **options: Any) -> dict[str, Tensor]:
    tuner = TestTimeFinetuner(model, lr=1e-3, capture=True, **options)
    for _ in range(2):  # the second query replays what the first recorded
        with tuner.adapted(texts(), COUNTS):
            found = state(model)
    return found


@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("build", [gpt2, tied_llama])
def test_early_updates_have_the_same_bits(
    build: Any,
    dtype: torch.dtype,
    precision: str | None,
    begun: list[torch.Size],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build().to("cuda", dtype)
    options = {} if precision is None else {"precision": precision}
    early = adapted(model, **options)
    assert begun
    begun.clear()
    monkeypatch.setattr(capture_memory.TiedMatrix, "parameter", lambda *_: None)
    late = adapted(model, **options)
    assert not begun
    for name, tensor in early.items():
        assert torch.equal(tensor, late[name]), name


class Reader(nn.Module):
    """Reads the matrix where no gradient shows it."""

    def __init__(self, inner: nn.Module, matrix: nn.Parameter) -> None:
        super().__init__()
        self.inner = inner
        self.matrices = [matrix]  # not registered again

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.matrices[-1].detach()
        return self.inner(x) + 0.1 * (x @ matrix.t() @ matrix).tanh()


def test_a_matrix_that_the_backward_half_reads_is_updated_last(begun: list[torch.Size]) -> None:
    model = gpt2().cuda()
    block = model.transformer.h[0]
    block.mlp = Reader(block.mlp, model.transformer.wte.weight)
    captured = adapted(model)
    assert not begun
    eager = TestTimeFinetuner(model, lr=1e-3, capture=False)
    with eager.adapted(texts(), COUNTS):
        assert distance(captured, state(model)) <= 1e-5
