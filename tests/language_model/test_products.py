# SPDX-License-Identifier: Apache-2.0
"""Sums and products of a pass, and gradients that exist in two dtypes."""

from __future__ import annotations

import pytest
import torch
from hullkit.language_model import products
from hullkit.language_model.fused_functions import FusedFunctions
from hullkit.language_model.products import add_into, add_product
from hullkit.language_model.residuals import NarrowGradient
from torch import Tensor, nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []  # there they run on it
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("backend", [None, "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", DTYPES)
def test_sums_are_rounded_once(
    dtype: torch.dtype, other: torch.dtype, backend: str | None, fresh: bool
) -> None:
    total, first = random(9, 345, dtype=dtype), random(9, 345, dtype=dtype, seed=1)
    second = random(9, 345, dtype=other, seed=2)
    wanted = first.float() + second.float()
    wanted = (wanted if fresh else wanted + total.float()).to(dtype)
    add_into(total, first, second, fresh, backend)
    if DEVICE.type == "cpu" and backend == "triton" and dtype is torch.bfloat16:
        error = (total.float() - wanted.float()).abs()  # the interpreter cuts bfloat16
        assert bool((error <= torch.finfo(dtype).eps * wanted.float().abs()).all())
    else:
        assert torch.equal(total, wanted)


def test_a_narrow_gradient_is_of_that_gradient_alone() -> None:
    gradient, other = (random(4, 6, dtype=torch.float32, seed=seed) for seed in range(2))
    narrow = gradient.to(torch.bfloat16)
    narrowed = NarrowGradient(torch.bfloat16)
    narrowed.put(gradient, narrow)
    assert narrowed.take(gradient.view(2, 2, 6).view(4, 6)) is narrow
    assert narrowed.take(gradient) is not narrow  # it is given once
    narrowed.put(gradient, narrow)
    assert torch.equal(narrowed.take(other), other.to(torch.bfloat16))
    narrowed.put(gradient, narrow)
    assert torch.equal(narrowed.take(gradient.t()), narrow.t())
    narrowed.put(gradient, narrow)
    gradient.mul_(2.0)
    assert torch.equal(narrowed.take(gradient), 2.0 * narrow)


@pytest.mark.parametrize("used", ["alone", "twice", "hook", "hook in place"])
def test_the_gradient_of_a_sum_has_the_bits_of_a_cast(
    used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else reads the sum or changes its gradient. float16: the interpreter rounds it."""
    made, taken = [], []
    put, take = NarrowGradient.put, NarrowGradient.take
    monkeypatch.setattr(NarrowGradient, "put", lambda *a: (put(*a), made.append(a[-1]))[0])
    monkeypatch.setattr(NarrowGradient, "take", lambda *a: (taken.append(take(*a)), taken[-1])[1])
    half = torch.float16
    norms = [nn.LayerNorm(8).to(DEVICE) for _ in range(2)]
    branches = [random(3, 8, dtype=half, seed=seed).requires_grad_() for seed in (3, 4)]
    arrived = []

    def change(gradient: Tensor) -> Tensor | None:
        if used == "hook":
            gradient = 2.0 * gradient
        if used == "hook in place":
            gradient.mul_(2.0)
        arrived.append(gradient.clone())
        return gradient if used == "hook" else None

    with FusedFunctions(backend="triton"):
        x = random(3, 8, dtype=torch.float32).requires_grad_() * 1.0
        for norm, branch in zip(norms, branches, strict=True):
            x = x + (norm(x).to(half) + branch)
            x.register_hook(change)
        y = norms[0](x)
    (random(3, 8, dtype=torch.float32, seed=5) * (y + x if used == "twice" else y)).sum().backward()
    for branch, gradient in zip(branches, reversed(arrived), strict=True):
        assert branch.grad is not None
        assert torch.equal(branch.grad, gradient.to(half))
    if used == "alone":  # no cast was needed
        assert [id(t) for t in taken] == [id(t) for t in made]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_long_sum_in_two_halves(dtype: torch.dtype, wide: bool, transposed: bool) -> None:
    a = random(400, 14336, dtype=dtype) / 64.0
    b = random(4096, 14336, dtype=dtype, seed=1).t()
    b = b if transposed else b.contiguous()
    assert products._pays_to_split(a, b)
    assert not products._pays_to_split(a.repeat(3, 1), b)  # enough tiles
    assert not products._pays_to_split(a, b[:, :1024])  # a smaller product
    kind = torch.float32 if wide else dtype
    before = random(400, 4096, dtype=kind, seed=2)
    whole = torch.mm(a, b, out_dtype=torch.float32)
    for fresh in (True, False):
        rest = torch.zeros_like(before) if fresh else before
        total = before.clone()
        add_product(total, a, b, fresh)
        exact = a.double() @ b.double() + rest.double()
        theirs = (rest.float() + whole).to(kind)
        errors = [float((t.double() - exact).norm()) for t in (total, theirs)]
        assert errors[0] <= 1.25 * errors[1]  # no further off than one product and one rounding
