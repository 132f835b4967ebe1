# SPDX-License-Identifier: Apache-2.0
"""Fused functions against torch's own: values and gradients. In Triton's interpreter on CPUs."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hullkit.language_model import norms, rotary, short_attention
from hullkit.language_model.fused_functions import FusedFunctions
from hullkit.language_model.gates import gated
from hullkit.language_model.norms import Norm, norm
from hullkit.language_model.products import SharedInput, column_sums
from torch import Tensor, nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []  # there they run on it
DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def gradients(
    function: Callable[..., Tensor], *inputs: Tensor, weight: Tensor | None = None
) -> list[Tensor]:
    """The result, and the gradients of its product with fixed numbers."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    result = function(*leaves)
    numbers = random(*result.shape, seed=9).to(result.dtype)
    result.backward(numbers)
    found = [leaf.grad for leaf in leaves]
    assert all(g is not None for g in found)
    return [result.detach(), *(g for g in found if g is not None)]


def assert_close(
    found: list[Tensor], exact: list[Tensor], roundings: float, least: float = 0.0
) -> None:
    """exact: float64. Differences in roundings of the dtype, relative to the largest element, or to
    `least` where terms of that size cancel."""
    for a, b in zip(found, exact, strict=True):
        assert a.shape == b.shape
        unit = torch.finfo(a.dtype).eps * max(least, float(b.abs().max()))
        assert float((a.double() - b).abs().max()) <= roundings * unit, a.dtype


def in_float64(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    return gradients(function, *(x.double() for x in inputs))


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


@pytest.mark.parametrize("rows", [1, 63, 64, 151])
def test_column_sums(rows: int) -> None:
    from hullkit.triton_kernels.launch import launch

    values = random(rows, 70)[:, :67]
    sums = values.new_empty(67)
    launch("column_sums", (5, 1), (values, sums, rows, 67, values.stride(0)), {})
    assert_close([sums], [values.double().sum(0)], 8.0)
    assert_close([column_sums(values, torch.float32)], [values.double().sum(0)], 8.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
def test_gates(name: str, dtype: torch.dtype) -> None:
    gate, up = 3.0 * random(7, 300, dtype=dtype), random(7, 300, dtype=dtype, seed=1)
    own = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    }[name]
    found = gradients(lambda g, u: gated(g, u, name), gate, up)
    assert_close(found, in_float64(lambda g, u: own(g) * u, gate, up), 4.0)


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table", DTYPES)
@pytest.mark.parametrize(
    ("texts", "tables", "heads", "width"),
    [(1, 1, 1, 2), (1, 1, 3, 64), (3, 1, 9, 96), (2, 2, 3, 8)],
)
def test_rotary(
    texts: int, tables: int, heads: int, width: int, dtype: torch.dtype, table: torch.dtype
) -> None:
    q = random(texts, 11, heads, width, dtype=dtype).transpose(1, 2)
    k = random(texts, 11, 2, width, dtype=dtype, seed=1).transpose(1, 2)
    cos, sin = random(2, tables, 11, width, dtype=table, seed=3)

    def exact(q: Tensor, k: Tensor) -> Tensor:
        wide = [t.to(q.dtype)[:, None] for t in (cos, sin)]
        return torch.cat([x * wide[0] + rotate_half(x) * wide[1] for x in (q, k)], 1)

    assert rotary.takes(q, cos, sin)
    assert rotary.takes(k, cos, sin)
    found = gradients(lambda q, k: torch.cat(rotary.rotary(q, k, cos, sin), 1), q, k)
    assert found[0].dtype is torch.promote_types(dtype, table)
    assert_close(found, in_float64(exact, q, k), 4.0)


def test_rotary_is_proven_on_any_default_device() -> None:
    def own(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return tuple(x * cos[:, None] + rotate_half(x) * sin[:, None] for x in (q, k))

    x, cos = torch.ones(1, 2, 3, 8, device=DEVICE), torch.ones(1, 3, 8, device=DEVICE)
    with torch.device("meta"):
        assert rotary._is_rotary(own, x, cos)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("many", [False, True], ids=["few heads", "many heads"])
@pytest.mark.parametrize(
    ("texts", "length", "heads", "shared", "width"),
    [(1, 1, 1, 1, 8), (1, 63, 2, 2, 32), (1, 130, 6, 2, 24), (3, 70, 3, 1, 16), (2, 128, 4, 2, 64)],
)
def test_attention(
    texts: int, length: int, heads: int, shared: int, width: int, many: bool, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(short_attention, "_MANY_PROGRAMS", 0 if many else 1 << 30)
    q = random(texts, length, heads, width, dtype=dtype).transpose(1, 2)
    k = random(texts, length, shared, width, dtype=dtype, seed=1).transpose(1, 2)
    v = random(texts, shared, length, width, dtype=dtype, seed=2)
    assert short_attention.takes(q, k, v)

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(heads // shared, 1) for x in (k, v))
        scores = q @ k.transpose(2, 3) * 0.3
        seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        return scores.where(seen, -math.inf).softmax(-1) @ v

    def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return short_attention.causal_attention(q, k, v, 0.3, dtype)

    # Weights and their gradients are rounded to `dtype` before the second product.
    assert_close(gradients(own, q, k, v), in_float64(exact, q, k, v), 16.0, 1.0)


class Block(nn.Module):
    """Linear layers that share an input, of both kinds, a gate, norms and attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(32)
        self.q, self.k, self.v = (nn.Linear(32, 32, bias=i < 2) for i in range(3))
        self.last = nn.LayerNorm(32)
        self.gate, self.up, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)
        self.weight = nn.Parameter(0.1 * torch.randn(32, 32))  # as in Conv1D
        self.bias = nn.Parameter(torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).view(1, -1, 2, 16).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + a.transpose(1, 2).reshape(x.shape)
        h = self.last(x)
        x = x + self.down(F.silu(self.gate(h)) * self.up(h))
        flat = torch.addmm(self.bias, self.norm(x).view(-1, 32), self.weight)
        return x + flat.view(x.shape) + h.float()


NAMES = {
    "torch.add",
    "torch.addmm",
    "torch.mul",
    "torch.nn.functional.layer_norm",
    "torch.nn.functional.linear",
    "torch.nn.functional.scaled_dot_product_attention",
    "torch.nn.functional.silu",
}


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block(dtype: torch.dtype, cast: bool) -> None:
    block = Block().to(DEVICE, dtype)
    x = random(1, 20, 32, dtype=dtype)

    def run(mode: FusedFunctions | None, kind: torch.dtype, autocast: bool) -> list[Tensor]:
        block.to(kind)
        block.zero_grad()
        leaf = x.to(kind, copy=True).requires_grad_()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            if mode is None:
                y = block(leaf)
            else:
                with mode:
                    y = block(leaf)
        (y.float() * random(1, 20, 32, seed=5).to(kind)).sum().backward()
        assert leaf.grad is not None
        grads = [p.grad for p in block.parameters()]
        return [y.detach(), leaf.grad, *(g.clone() for g in grads if g is not None)]

    mode = FusedFunctions(backend="triton")
    found = run(mode, dtype, cast)
    assert mode.names == (
        NAMES
        if cast or dtype is torch.bfloat16
        else NAMES - {"torch.nn.functional.scaled_dot_product_attention"}
    )
    own = run(None, dtype, cast)
    exact = run(None, torch.float64, False)
    assert [t.dtype for t in found] == [t.dtype for t in own]
    for a, b, c in zip(found, own, exact, strict=True):
        error, theirs = ((t.double() - c).norm() / c.norm() for t in (a, b))
        # No further from the exact ones than torch's own, but for what chance makes of few numbers.
        # The interpreter cuts bfloat16, and a cut is twice as far off as a rounding.
        assert error <= (1.5 if DEVICE.type == "cuda" else 3.0) * theirs + 1e-6


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    "changed",
    ["nothing", "the weight", "its memory", "the formula", "the sum", "the reader", "the result"],
)
def test_a_norm_that_is_made_with_its_sum(changed: str, wide: bool) -> None:
    """A second pass knows who reads a sum; whatever has changed then, results are the same."""
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
    mode = FusedFunctions(backend="triton")
    found = run(mode, True)
    assert "torch.add" in mode.names
    alone = run(None, changed not in ("the weight",))
    for a, b in zip(found, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=0.03, atol=0.06)


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


def test_layers_that_share_an_input_read_what_it_is_now() -> None:
    layer, x = nn.Linear(8, 8).to(DEVICE), random(3, 8)
    with FusedFunctions(backend="triton"):
        first = layer(x)
        x.mul_(2.0)
        second = layer(x)
    assert torch.equal(second, layer(x)) or torch.allclose(second, layer(x), rtol=1e-6)
    assert not torch.equal(first, second)


class Halved(Tensor):
    """A weight with arithmetic of its own, as quantised ones have."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result * 0.5 if func is F.linear else result


def test_a_weight_of_another_class_keeps_its_functions() -> None:
    weight, x = random(8, 8).as_subclass(Halved), random(3, 8)  # type: ignore[arg-type]
    mode = FusedFunctions(backend="triton")
    with mode:
        y = F.linear(x, weight)
    assert not mode.names
    torch.testing.assert_close(y.as_subclass(Tensor), 0.5 * x @ weight.as_subclass(Tensor).t())


def test_an_input_that_needs_no_gradient() -> None:
    layer = nn.Linear(8, 8).to(DEVICE)
    with FusedFunctions(backend="triton"):
        layer(random(3, 8)).sum().backward()
    assert layer.weight.grad is not None
    wanted = random(3, 8).sum(0).expand(8, 8)
    torch.testing.assert_close(layer.weight.grad, wanted)


class RMS(nn.Module):
    """An RMS norm, and what somebody made of it."""

    def __init__(self, change: str = "") -> None:
        super().__init__()
        self.weight = nn.Parameter(random(48))
        self.eps = 1e-6
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        eps = 1e-4 if self.change == "eps" else self.eps
        y = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        if self.change == "clip":
            y = y.clamp(-2.0, 2.0)
        weight = self.weight + 1.0 if self.change == "offset" else self.weight
        y = y.to(x.dtype) * weight
        return 1.02 * y if self.change == "scale" else y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", ["", "eps", "clip", "offset", "scale"])
def test_a_changed_norm_is_refused_or_right(change: str, dtype: torch.dtype) -> None:
    module = RMS(change).to(DEVICE, dtype)
    found = norms.proven_rms_norm(module, dtype)
    if change in ("eps", "clip", "scale"):
        assert found is None
    else:
        assert found is not None
        assert found.offset == (1.0 if change else 0.0)
        x = random(1, 9, 48, dtype=dtype)
        y, _ = norm(x, module.weight, None, found, dtype)
        # Weight and result are rounded, and the normalised row; the interpreter cuts.
        bound = 4.0 * torch.finfo(dtype).eps
        torch.testing.assert_close(y, module(x), rtol=bound, atol=bound)


def test_a_norm_that_another_tensor_takes_part_in_is_refused() -> None:
    module = RMS().to(DEVICE)
    module.register_buffer("other", torch.ones(48, device=DEVICE))
    assert norms.proven_rms_norm(module, torch.float32) is None


def test_attention_that_is_not_causal_stays_torchs() -> None:
    q: Any = random(1, 2, 9, 16, dtype=torch.bfloat16).requires_grad_()
    mode = FusedFunctions(backend="triton")
    with mode:
        F.scaled_dot_product_attention(q, q, q)
        F.scaled_dot_product_attention(q, q, q, torch.zeros(9, 9, dtype=q.dtype, device=DEVICE))
    assert not mode.names


def test_a_gradient_left_by_layers_is_taken_once() -> None:
    shared = SharedInput(torch.float32)
    shared.add(torch.ones(2, 3), torch.ones(3, 4))
    shared.add(torch.ones(2, 3), torch.ones(3, 4))
    taken = shared.take()
    assert taken is not None
    assert torch.equal(taken, torch.full((2, 4), 6.0))
    assert shared.take() is None
