# SPDX-License-Identifier: Apache-2.0
"""Norms, and residuals around them, by kernels. In Triton's interpreter on CPUs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from _fused import DEVICE, DTYPES, assert_close, gradients, in_float64, random
from hullkit.language_model import norms, residual_norms
from hullkit.language_model.fused_functions import FusedFunctions
from hullkit.language_model.norms import Norm, norm
from hullkit.language_model.products import column_sums
from torch import Tensor, nn

pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []  # there they run on it


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 5), (3, 17), (130, 64), (5, 1000)])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("together", [False, True], ids=["a row each", "rows together"])
def test_norms(
    rows: int, columns: int, rms: bool, offset: float, together: bool, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(norms, "_MANY_ROWS", 0 if together else 1 << 30)
    monkeypatch.setattr(norms, "_MOST_PROGRAMS", 2 if together else 256)  # in turns, or one each
    x = random(1, rows, columns, dtype=dtype) + 0.5
    weight, bias = random(columns, dtype=dtype, seed=1), random(columns, dtype=dtype, seed=2)
    formula = Norm(1e-3, rms=rms, offset=offset)

    def exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if not rms:
            x = x - x.mean(-1, keepdim=True)
        return x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * (weight + offset) + bias

    found = gradients(lambda x, w, b: norm(x, w, b, formula, dtype)[0], x, weight, bias)
    # Sums over rows have as many terms in float32.
    assert_close(found, in_float64(exact, x, weight, bias), 8.0)


@pytest.mark.parametrize("together", [False, True], ids=["a row each", "rows together"])
@pytest.mark.parametrize(
    ("dtype", "other", "narrow"),
    [
        (torch.float32, torch.float32, True),
        (torch.float32, torch.bfloat16, True),
        (torch.bfloat16, torch.bfloat16, False),
        (torch.float16, torch.float16, False),
    ],
)
@pytest.mark.parametrize(
    "formula", [Norm(1e-3, rms=False), Norm(1e-3), Norm(1e-3, offset=1.0, rounded=True)]
)
def test_a_sum_and_its_norm_have_the_bits_of_both_alone(
    formula: Norm, dtype: torch.dtype, other: torch.dtype, narrow: bool, together: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(norms, "_MANY_ROWS", 0 if together else 1 << 30)
    for columns in (40, 576, 1000):
        x, branch = random(37, columns, dtype=dtype), random(37, columns, dtype=other, seed=1)
        weight = random(columns, dtype=dtype, seed=2)
        bias = None if formula.rms else random(columns, dtype=dtype, seed=3)
        total = torch.empty_like(x)
        arguments = (weight, bias, formula, dtype, narrow)
        made = norms.normed(x, *arguments, residual=(branch, total))
        if DEVICE.type == "cuda" or torch.float32 is other:  # the interpreter cuts halves
            assert torch.equal(total, x + branch)
        alone = norms.normed(total, *arguments)
        for one, two in zip(made, alone, strict=True):
            if one is not None and one is not made.means:  # RMS norms have none
                assert torch.equal(one, two)


@pytest.mark.parametrize("rows", [1, 63, 64, 151])
def test_column_sums(rows: int) -> None:
    from hullkit.triton_kernels.launch import launch

    values = random(rows, 70)[:, :67]
    sums = values.new_empty(67)
    launch("column_sums", (5, 1), (values, sums, rows, 67, values.stride(0)), {})
    assert_close([sums], [values.double().sum(0)], 8.0)
    assert_close([column_sums(values, torch.float32)], [values.double().sum(0)], 8.0)
    several, sums = random(3, rows, 67), values.new_empty(3, 67)
    launch("column_sums", (5, 3), (several, sums, rows, 67, several.stride(1)), {})
    assert_close([sums], [several.double().sum(1)], 8.0)
    assert_close([column_sums(several, torch.float32)], [several.double().sum(1)], 8.0)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    "changed",
    ["nothing", "the weight", "its memory", "the formula", "the sum", "the reader", "the result"],
)
def test_a_norm_that_is_made_with_its_sum(
    changed: str, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second pass knows who reads a sum; whatever has changed then, results are the same."""
    given = []
    take = residual_norms.ResidualNorms.take

    def noted(self: residual_norms.ResidualNorms, x: Tensor, call: Any) -> Any:
        given.append(take(self, x, call))
        return given[-1]

    monkeypatch.setattr(residual_norms.ResidualNorms, "take", noted)
    dtype = torch.float32 if wide else torch.bfloat16
    first, second, other, third = (nn.LayerNorm(24).to(DEVICE, dtype) for _ in range(4))
    nn.init.constant_(third.weight, 0.5)
    x, branch = random(3, 24, dtype=dtype), random(3, 24, dtype=torch.bfloat16, seed=1)

    def block(x: Tensor, branch: Tensor, change: bool) -> Tensor:
        h = first(x)
        x = x + branch
        if change and changed == "the weight":
            with torch.no_grad():
                second.weight.mul_(1.5)
        if change and changed == "its memory":
            second.weight.data = torch.linspace(0.5, 1.5, 24).to(DEVICE, dtype)
        if change and changed == "the formula":
            second.eps = 2.0
        if change and changed == "the sum":
            x.mul_(2.0)
        readers = [other, second]  # the latter is expected in the next pass
        if change and changed == "the reader":
            readers = [other, third]
        y, z = (layer(x) for layer in readers)
        if change and changed == "the result":  # a second one is another tensor
            return (h + y + z.mul_(2.0) * second(x) + x).float()
        return (h + y * z + x).float()

    def run(mode: FusedFunctions | None, change: bool) -> list[Tensor]:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=wide), mode or nullcontext():
            return gradients(lambda *inputs: block(*inputs, change), x, branch)

    run(FusedFunctions(backend="triton"), False)
    assert given
    assert not any(given)
    found = run(FusedFunctions(backend="triton"), True)
    assert any(given) == (changed in ("nothing", "the result"))
    alone = run(None, changed not in ("the weight",))
    # Seven roundings of bfloat16, of the number or of terms up to 2 that cancel in it. What is
    # changed changes norms by a factor of 1.5 and more.
    unit = torch.finfo(torch.bfloat16).eps
    for a, b in zip(found, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=7.0 * unit / 2.0, atol=14.0 * unit / 2.0)


def test_a_norm_that_nobody_reads_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    add = residual_norms._add
    monkeypatch.setattr(residual_norms, "_add", lambda *a: made.append(a) or add(*a))
    first, second = (nn.LayerNorm(24).to(DEVICE) for _ in range(2))
    for read, wanted in ((True, 2), (True, 2), (False, 1), (False, 0)):
        made.clear()
        with FusedFunctions(backend="triton"):
            x = random(3, 24).requires_grad_()
            for _ in range(2):  # in the first pass the kernel runs once ahead, to be compiled
                first(x)
                x = x + 1.0 * x
                x = second(x) if read else 1.0 * x
        assert len(made) == wanted, read


@pytest.mark.parametrize("used", ["norm first", "residual first", "residual alone", "twice"])
def test_a_residual(used: str) -> None:
    """Both halves leave x's gradient in one place, in whatever order autograd runs them."""
    layer, late = (nn.LayerNorm(8).to(DEVICE) for _ in range(2))

    def block(x: Tensor) -> Tensor:
        x = 2.0 * x
        h = layer(x)
        if used == "norm first":  # its gradient comes before the residual's
            return (x + random(3, 8, seed=7).requires_grad_().exp()) * 3.0 + h.exp()
        if used == "residual first":
            return x + h.exp()
        if used == "residual alone":
            return x + x.detach().exp()
        return (h.exp() + x) * late(x) + (x + h)

    found = []
    for mode in (FusedFunctions(backend="triton"), nullcontext()):
        leaf = random(3, 8).requires_grad_()
        with mode:
            y = block(leaf)
        y.square().sum().backward()
        found += [y.detach(), leaf.grad]
    assert_close(found[:2], [t.double() for t in found[2:]], 64.0)
