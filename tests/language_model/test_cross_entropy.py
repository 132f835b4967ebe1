# SPDX-License-Identifier: Apache-2.0
"""The fused next-token loss against torch's. In Triton's interpreter where there is no GPU."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hullkit.language_model import cross_entropy
from hullkit.language_model.cross_entropy import (
    TiedGradient,
    linear_next_token_loss,
    next_token_loss,
)
from hullkit.triton_kernels.cross_entropy import BLOCK_SIZE
from hullkit.triton_kernels.launch import launch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []  # there they run on it
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# What one rounding to the gradient's dtype may differ by; the interpreter cuts bfloat16 instead.
GRADIENT = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2**-9, torch.bfloat16: 2**-7}


def fused(logits: Tensor, labels: Tensor) -> Tensor:
    return next_token_loss(logits, labels, backend="triton")


def plain(logits: Tensor, labels: Tensor) -> Tensor:
    exact = logits[0, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(exact, labels[0, 1:])


def problem(length: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length * vocabulary)
    logits = 4.0 * torch.randn(1, length, vocabulary, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocabulary, (1, length), generator=generator)
    return logits.to(DEVICE, dtype), labels.to(DEVICE)


def gradient(
    loss_of: object, logits: Tensor, labels: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    loss = loss_of(leaf * 1.0, labels)  # type: ignore[operator]
    (scale * loss).backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("length", "vocabulary"), [(2, 1), (2, 7), (9, 2047), (5, 2048), (3, 4999)]
)
@pytest.mark.parametrize("scale", [1.0, -3.0])
def test_loss_and_gradient(length: int, vocabulary: int, dtype: torch.dtype, scale: float) -> None:
    logits, labels = problem(length, vocabulary, dtype)
    if length > 3:
        labels[0, 2] = -100
    loss, grad = gradient(fused, logits, labels, scale)
    wanted, wanted_grad = gradient(plain, logits, labels, scale)
    assert loss.dtype == wanted.dtype
    exact = dtype is torch.float64
    torch.testing.assert_close(loss, wanted, rtol=1e-13 if exact else 1e-6, atol=1e-6 * (not exact))
    # Small ones come from differences of numbers near 1, or below half precision's least.
    torch.testing.assert_close(grad, wanted_grad, rtol=GRADIENT[dtype], atol=1e-7)
    assert not grad[0, -1].any()
    if length > 3:
        assert not grad[0, 1].any()


def test_rows_that_are_not_contiguous() -> None:
    logits, labels = problem(6, 130, torch.float32)
    wide = torch.full((1, 6, 200), math.nan, device=DEVICE)
    wide[:, :, :130] = logits
    columns = logits.transpose(1, 2).contiguous().transpose(1, 2)
    wanted = fused(logits, labels)
    assert torch.equal(fused(wide[:, :, :130], labels), wanted)
    assert torch.equal(fused(columns, labels), wanted)


def test_minus_infinity_is_a_probability_of_zero() -> None:
    """Masked tokens; a whole first block of them too."""
    logits, labels = problem(4, 5000, torch.float32)
    logits[..., :4096] = -math.inf
    labels[:] = labels % 100 + 4900
    loss, grad = gradient(fused, logits, labels, 1.0)
    wanted, wanted_grad = gradient(plain, logits, labels, 1.0)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-6, atol=1e-7)
    labels[0, 1] = 0
    assert math.isinf(fused(logits, labels).item())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 2500, 4999])
def test_what_is_not_finite_is_seen(value: float, column: int) -> None:
    logits, labels = problem(4, 5000, torch.float32)
    labels[0, 2] = 7
    logits[0, 1, column] = value
    assert not math.isfinite(fused(logits, labels).item())
    logits[0, 1, column] = 0.0
    logits[0, -1, column] = value  # not scored
    assert math.isfinite(fused(logits, labels).item())


@pytest.mark.parametrize("target", [7, 1 << 40, -1])
def test_a_label_without_a_logit_has_no_finite_loss(target: int) -> None:
    logits, labels = problem(4, 7, torch.float32)
    labels[0, 2] = target
    assert fused(logits, labels).isnan()


def test_the_gradient_takes_the_place_of_the_logits() -> None:
    """Who else needs them for the backward pass is told so, and not given something else."""
    leaf, labels = problem(3, 11, torch.float32)
    leaf.requires_grad_()
    logits = leaf * 1.0
    other = logits.square().mean()
    loss = fused(logits, labels) + other  # the later one's backward comes first
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss, inputs=[leaf])


@pytest.mark.parametrize("last", ["log_softmax", "tanh", "relu and a view"])
def test_a_last_function_that_needs_its_result(last: str) -> None:
    functions = {
        "log_softmax": lambda h: F.log_softmax(h, -1),
        "tanh": torch.tanh,
        "relu and a view": lambda h: F.relu(h)[0][None],
    }
    leaf, labels = problem(3, 11, torch.float32)
    found = []
    for loss in (fused, plain):
        leaf = leaf.detach().clone().requires_grad_()
        loss(functions[last](leaf), labels).backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found)


def linear_problem(dtype: torch.dtype, length: int, vocabulary: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(length)
    hidden = torch.randn(1, length, 24, generator=generator, dtype=torch.float64)
    weight = 0.5 * torch.randn(vocabulary, 24, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocabulary, (1, length), generator=generator)
    labels[0, 3] = -100
    leaves = (hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype))
    return *(leaf.requires_grad_() for leaf in leaves), labels.to(DEVICE)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("vocabulary", [3, 64, 4999, 8200])
@pytest.mark.parametrize("rows", [100, 5, 1])
@pytest.mark.parametrize("scale", [1.0, -3.0])
def test_a_loss_without_all_logits(
    dtype: torch.dtype,
    bound: float,
    vocabulary: int,
    rows: int,
    scale: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In chunks of one row, of five and a rest of one, and in one of all."""
    row_bytes = -(-vocabulary // 64) * 64 * dtype.itemsize
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", rows * row_bytes)
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 1)
    hidden, weight, labels = linear_problem(dtype, 11, vocabulary)
    loss = linear_next_token_loss(hidden, weight, labels)
    wanted = plain(F.linear(hidden, weight), labels)
    torch.testing.assert_close(loss, wanted, rtol=max(bound, 1e-13), atol=0.0)
    found = torch.autograd.grad(scale * loss, (hidden, weight))
    for grad, other in zip(
        found, torch.autograd.grad(scale * wanted, (hidden, weight)), strict=True
    ):
        assert float((grad - other).norm()) <= bound * float(other.norm())


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_without_all_logits_that_are_finite(value: float) -> None:
    """One in a whole block of the kernel, one in the rest; the row that is not scored has none."""
    hidden, weight, labels = linear_problem(torch.float32, 5, 8200)
    with torch.no_grad():
        hidden[:] = hidden.abs()
        hidden[0, 2] = 0.0  # its label is not scored, and 0 times infinity is NaN
        for column in (0, 2500, 8199):
            kept = weight[column].clone()
            weight[column] = value
            labels[0, 1] = (column + 1) % 8200
            loss = linear_next_token_loss(hidden, weight, labels)
            assert math.isfinite(loss.item()) == (value == -math.inf)
            if value == -math.inf:
                torch.testing.assert_close(loss, plain(F.linear(hidden, weight), labels))
            weight[column] = kept
        labels[0, 1] = 8200
    assert linear_next_token_loss(hidden, weight, labels).isnan()


def test_what_needs_no_gradient_gets_none() -> None:
    hidden, weight, labels = linear_problem(torch.float32, 6, 130)
    both = torch.autograd.grad(linear_next_token_loss(hidden, weight, labels), (hidden, weight))
    for leaf, other, wanted in ((hidden, weight, both[0]), (weight, hidden, both[1])):
        other.requires_grad_(False)
        (grad,) = torch.autograd.grad(linear_next_token_loss(hidden, weight, labels), (leaf,))
        other.requires_grad_()
        torch.testing.assert_close(grad, wanted)
    with torch.no_grad():
        assert not linear_next_token_loss(hidden, weight, labels).requires_grad


@pytest.mark.parametrize("rows", [100, 4])
def test_a_linear_loss_in_lower_precision(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are in autocast's dtype, gradients in the leaves'; in one chunk and in three."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", rows * 192 * 2)
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 1)
    hidden, weight, labels = linear_problem(torch.float32, 9, 130)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss = linear_next_token_loss(hidden, weight, labels)
    wanted = plain(F.linear(hidden, weight), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, rtol=0.02, atol=0.0)
    found = torch.autograd.grad(loss, (hidden, weight))
    for grad, other in zip(found, torch.autograd.grad(wanted, (hidden, weight)), strict=True):
        assert grad.dtype == torch.float32
        assert 1e-6 < float((grad - other).norm() / other.norm()) <= 0.02


@pytest.mark.parametrize("lookups", [1, 2])
@pytest.mark.parametrize("linear", [True, False])
def test_a_matrix_that_is_embedding_and_last_layer(lookups: int, linear: bool) -> None:
    """Repeated ids too; without the last layer, or at a second lookup, autograd adds."""
    _, weight, labels = linear_problem(torch.float64, 12, 7)
    ids = labels.abs() % 7
    gradients = []
    for tied in (TiedGradient(), None):
        look_up = tied.embedding if tied else F.embedding
        hidden = sum(look_up(ids + 0, weight).tanh() for _ in range(lookups))
        assert isinstance(hidden, Tensor)
        if not linear:
            loss = hidden.square().sum()
        elif tied:
            loss = linear_next_token_loss(hidden, weight, labels, tied)
        else:
            loss = plain(F.linear(hidden, weight), labels)
        gradients.append(torch.autograd.grad(2.0 * loss, (weight,))[0])
        assert tied is None or tied.taken is None
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_logits_at_a_time() -> None:
    """Many for a batch of texts, fewer where a row of them is long."""
    rows = cross_entropy._rows_at_once
    assert rows(1 << 10) == 80 << 10
    assert rows(100 << 10) == 2048
    assert rows(200 << 10) == 1310
    assert rows(1 << 20) == 256
    assert rows(1 << 40) == 1


def test_a_program_rescales_many_blocks() -> None:
    values = torch.ones(5 * BLOCK_SIZE + 3, device=DEVICE)
    launch("rescale", 2, (values, torch.full((1,), 0.5, device=DEVICE), values.numel() - 1), {})
    assert values[:-1].unique().tolist() == [0.5]
    assert values[-1] == 1.0
