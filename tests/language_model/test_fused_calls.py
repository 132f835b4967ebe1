# SPDX-License-Identifier: Apache-2.0
"""How models call torch's functions: by keyword, with views, hooks and frozen parameters."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hullkit.language_model.fused_functions import FusedFunctions
from torch import Tensor, nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []  # there they run on it


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE)


def fused_and_plain(run: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
    found = []
    for mode in (FusedFunctions(backend="triton"), nullcontext()):
        with mode:
            found.append(run())
    return found


X, Y, W, B = random(3, 8), random(3, 8, seed=1), random(8, 8), random(8)
HEADS = random(1, 2, 5, 4)
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: F.linear(input=x, weight=W, bias=B),
    "addmm": lambda x: torch.addmm(input=B, mat1=x, mat2=W, beta=0.5),
    "layer_norm": lambda x: F.layer_norm(input=x, normalized_shape=(8,), weight=B, bias=B),
    "silu": lambda x: F.silu(input=x),
    "gelu": lambda x: F.gelu(input=x, approximate="tanh"),
    "mul": lambda x: torch.mul(input=F.silu(x), other=Y),
    "mul, method": lambda x: F.silu(x).mul(other=Y),
    "add": lambda x: torch.add(input=x, other=F.layer_norm(x, (8,), B, B), alpha=2),
    "add, method": lambda x: x.add(other=F.layer_norm(x, (8,), B, B)),
    "attention": lambda x: F.scaled_dot_product_attention(
        query=HEADS * x.sum(), key=HEADS, value=HEADS, is_causal=True
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_by_keyword(name: str) -> None:
    def run() -> list[Tensor]:
        x = X.clone().requires_grad_()
        y = CALLS[name](x)
        y.square().sum().backward()
        assert x.grad is not None
        return [y.detach(), x.grad]

    for ours, theirs in zip(*fused_and_plain(run), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_result_that_is_written_to_an_argument() -> None:
    out = torch.empty_like(X)
    with FusedFunctions(backend="triton"):
        torch.mul(F.silu(X), Y, out=out)
    torch.testing.assert_close(out, F.silu(X) * Y)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_layer_norm_of_which_one_part_is_trained(frozen: str) -> None:
    def run() -> list[Tensor]:
        layer = nn.LayerNorm(8).to(DEVICE)
        getattr(layer, frozen).requires_grad_(False)
        layer(X).square().sum().backward()
        [trained] = [p for p in layer.parameters() if p.requires_grad]
        assert trained.grad is not None
        assert getattr(layer, frozen).grad is None
        return [trained.grad]

    for ours, theirs in zip(*fused_and_plain(run), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_layer_norm_with_strided_parameters() -> None:
    weight, bias = random(16)[::2], random(16, seed=1)[::2]
    x = X.clone().requires_grad_()
    ours, theirs = fused_and_plain(lambda: [F.layer_norm(x, (8,), weight, bias)])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    with FusedFunctions(backend="triton"), pytest.raises(RuntimeError):
        F.layer_norm(x, (8,), weight, bias[:5])
    with FusedFunctions(backend="triton"), pytest.raises(RuntimeError):
        F.layer_norm(x, x.shape, B, B)


@pytest.mark.parametrize("case", ["no gradient", "transposed", "transposed square"])
def test_views_that_are_other_tensors(case: str) -> None:
    """A view of an input that another layer has read."""

    def run() -> list[Tensor]:
        leaf = random(8, 8 if "square" in case else 3).requires_grad_()
        h = leaf.t().exp()  # not contiguous
        first = nn.Linear(8, 8, device=DEVICE)
        second = nn.Linear(h.shape[0], 8, device=DEVICE)
        for seed, layer in enumerate((first, second)):
            layer.weight.data = random(*layer.weight.shape, seed=seed)
            layer.bias.data.zero_()
        if case == "no gradient":
            h = h.contiguous()
            with torch.no_grad():
                view = h.view(*h.shape)
            out = first(h).sum() + F.linear(view, W).square().sum()
        else:
            out = first(h).sum() + second(h.t()).square().sum()
        out.backward()
        assert leaf.grad is not None
        return [out.detach(), leaf.grad]

    for ours, theirs in zip(*fused_and_plain(run), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_hook_of_a_norm_gets_the_gradient() -> None:
    arrived: list[Any] = []

    def stop(gradient: Tensor) -> Tensor:
        arrived.append(gradient)
        return 0.0 * gradient

    layer, last = nn.LayerNorm(8).to(DEVICE), nn.Linear(8, 8, device=DEVICE)
    x = X.clone().requires_grad_()
    with FusedFunctions(backend="triton"), torch.autocast(DEVICE.type, torch.bfloat16):
        h = layer(x)
        h.register_hook(stop)
        last(h).float().square().sum().backward()
    assert arrived[-1].abs().max() > 0.0
    assert x.grad is not None
    assert not x.grad.any()


def test_a_hook_of_an_activation_is_heard() -> None:
    x = X.clone().requires_grad_()
    with FusedFunctions(backend="triton"):
        a = F.silu(x)
        a.register_hook(lambda gradient: 0.0 * gradient)
        (a * Y).sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


def test_a_gate_that_changes_after_its_activation() -> None:
    up = Y.clone().requires_grad_()
    gate = X.clone()
    with FusedFunctions(backend="triton"):
        a = F.silu(gate)
        gate.mul_(3.0)
        y = a * up
    torch.testing.assert_close(y, F.silu(X) * Y)
