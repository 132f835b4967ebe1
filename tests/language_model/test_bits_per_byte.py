# SPDX-License-Identifier: Apache-2.0
"""bits_per_byte against the float64 oracle, and what it must leave alone."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from hullkit import bits_per_byte
from hullkit.reference.metrics import bits_per_byte as oracle
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

VOCABULARY = 37
MODULE = sys.modules["hullkit.language_model.bits_per_byte"]  # its name is the function's


class TableLM(nn.Module):
    """Logits of the next token depend on the current one. Dropout would show."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, VOCABULARY, dtype=dtype)
        self.dropout = nn.Dropout(0.5)
        self.grad_enabled: bool | None = None

    def forward(self, ids: Tensor) -> Tensor:
        self.grad_enabled = torch.is_grad_enabled()
        out: Tensor = self.dropout(self.table(ids))
        return out


class Fixed(nn.Module):
    """Returns what it was given."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output

    def forward(self, ids: Tensor) -> object:
        return self.output


@pytest.fixture
def ids() -> Tensor:
    return torch.from_numpy(np.random.default_rng(5).integers(0, VOCABULARY, 50))


def table_lm(dtype: torch.dtype = torch.float32) -> TableLM:
    torch.manual_seed(1)
    return TableLM(dtype)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.5
    )
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize("shape", [(50,), (1, 50)])
def test_is_the_oracle_for_hugging_face(ids: Tensor, shape: tuple[int, ...]) -> None:
    model = gpt2().eval()
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    got = bits_per_byte(model, ids.reshape(shape), 123)
    assert isinstance(got, float)
    assert got == pytest.approx(oracle(logits, ids, 123), rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.float16, 1e-6), (torch.bfloat16, 1e-6)],
)
def test_is_the_oracle_in_every_dtype(ids: Tensor, dtype: torch.dtype, tolerance: float) -> None:
    model = table_lm(dtype).eval()
    logits = model.table.weight.detach().double()[ids]
    # The logits are what they are; log-softmax in float32 must not add error of the low precision.
    assert bits_per_byte(model, ids, 60) == pytest.approx(oracle(logits, ids, 60), rel=tolerance)


def test_known_value() -> None:
    uniform = Fixed(torch.zeros(1, 5, 16))  # 4 bits for each of the 4 scored tokens
    assert bits_per_byte(uniform, torch.arange(5), 8) == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize("elements", [1, VOCABULARY * 7, VOCABULARY * 49])
def test_chunks_do_not_change_the_result(
    ids: Tensor, monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    whole = bits_per_byte(table_lm(), ids, 60)
    monkeypatch.setattr(MODULE, "_CHUNK_ELEMENTS", elements)
    assert bits_per_byte(table_lm(), ids, 60) == whole


def test_no_dropout_no_gradient_and_flags_put_back(ids: Tensor) -> None:
    model = gpt2().train()
    model.transformer.h[1].eval()
    flags = [module.training for module in model.modules()]
    scores = {bits_per_byte(model, ids, 60) for _ in range(3)}
    assert scores == {bits_per_byte(gpt2().eval(), ids, 60)}
    assert [module.training for module in model.modules()] == flags
    plain = table_lm()
    bits_per_byte(plain, ids, 60)
    assert plain.grad_enabled is False
    assert plain.training
    assert plain.dropout.training
    assert torch.is_grad_enabled()


def test_flags_put_back_after_an_error(ids: Tensor) -> None:
    model = Fixed(None).train()
    with pytest.raises(TypeError, match=r"model output: expected .*logits, got NoneType"):
        bits_per_byte(model, ids, 60)
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": torch.exp}, TypeError, r"model: expected a torch.nn.Module, got"),
        ({"input_ids": [1, 2]}, TypeError, "input_ids: expected a torch.Tensor, got list"),
        ({"input_ids": torch.ones(3)}, TypeError, "input_ids: expected dtype torch.int64, got"),
        ({"input_ids": torch.tensor(3)}, ValueError, r"input_ids: expected shape \(T,\) or .*\(\)"),
        ({"input_ids": torch.ones(2, 3).long()}, ValueError, r"input_ids: .*, got \(2, 3\)"),
        ({"input_ids": torch.tensor([3])}, ValueError, "input_ids: expected at least 2 .* got 1"),
        ({"input_ids": torch.tensor([1, VOCABULARY])}, ValueError, r"ids in \[0, 37\), got 37"),
        ({"input_ids": torch.tensor([-1, 2])}, ValueError, r"ids in \[0, 37\), got -1"),
        ({"num_bytes": 0}, ValueError, "num_bytes: expected an int >= 1, got 0"),
        ({"num_bytes": 2.0}, TypeError, "num_bytes: expected an int, got float"),
        ({"num_bytes": True}, TypeError, "num_bytes: expected an int, got bool"),
        ({"model": Fixed(torch.ones(2, 5))}, ValueError, r"logits: .* \(1, 2, V\), got \(2, 5\)"),
        ({"model": Fixed(torch.full((1, 2, 3), math.nan))}, FloatingPointError, "finite.* got nan"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    good = {"model": table_lm(), "input_ids": torch.tensor([1, 2]), "num_bytes": 3}
    with pytest.raises(error, match=message):
        bits_per_byte(**{**good, **arguments})  # type: ignore[arg-type]


def test_impossible_token_is_an_error_not_inf() -> None:
    logits = torch.zeros(1, 2, 3)
    logits[0, 0, 1] = -math.inf
    with pytest.raises(FloatingPointError, match=r"input_ids: expected a finite .* got inf"):
        bits_per_byte(Fixed(logits), torch.tensor([0, 1]), 1)


def test_a_token_without_a_logit_is_named() -> None:
    """The model does not tell how many logits it has."""
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 5))
    assert bits_per_byte(model, torch.tensor([7, 1, 4]), 2) > 0.0
    with pytest.raises(ValueError, match=r"predicted: expected ids in \[0, 5\), got 6"):
        bits_per_byte(model, torch.tensor([7, 1, 6]), 2)
