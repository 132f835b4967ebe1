# SPDX-License-Identifier: Apache-2.0
"""Fused functions against torch's own: values and gradients. In Triton's interpreter on CPUs."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _fused import DEVICE, DTYPES, assert_close, gradients, in_float64, random
from hullkit.language_model import norms, rotary
from hullkit.language_model.fused_functions import FusedFunctions
from hullkit.language_model.gates import gated
from hullkit.language_model.norms import norm
from hullkit.language_model.products import SharedInput
from torch import Tensor, nn

pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []  # there they run on it


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
    found = gradients(lambda q, k: torch.cat(rotary.rotary(q, k, cos, sin)[0], 1), q, k)
    assert found[0].dtype is torch.promote_types(dtype, table)
    assert_close(found, in_float64(exact, q, k), 4.0)


def test_rotary_positions_of_different_batches_stay_the_models() -> None:
    """Tables of one text fit any number of texts, of q and of k."""

    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
            return apply_rotary_pos_emb(q, k, cos, sin)

    [found] = rotary.replacements(Model(), lambda x: True, lambda *_: None, names := set())
    (q, k), (cos, sin) = (random(n, 2, 5, 8) for n in (3, 1)), random(2, 1, 5, 8)
    for a, b in zip(
        found.stand_in(apply_rotary_pos_emb, q, k, cos, sin),
        apply_rotary_pos_emb(q, k, cos, sin),
        strict=True,
    ):
        assert torch.equal(a, b)
    assert not names
    found.stand_in(apply_rotary_pos_emb, q, q, cos, sin)
    assert names


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return tuple(x * cos[:, None] + rotate_half(x) * sin[:, None] for x in (q, k))


def test_a_rotation_with_other_gradients_or_parts_is_not_proven() -> None:
    def cut(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return q, k.detach() + 0.0 * k

    x, cos = random(1, 2, 5, 8), random(1, 5, 8)
    assert not rotary._is_rotary(cut, x, cos)
    own = FunctionType(apply_rotary_pos_emb.__code__, {**globals()})
    assert rotary._is_rotary(own, x, cos)
    own.__globals__["rotate_half"] = lambda x: x
    assert not rotary._is_rotary(own, x, cos)


def test_rotary_is_proven_on_any_default_device() -> None:
    def own(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return tuple(x * cos[:, None] + rotate_half(x) * sin[:, None] for x in (q, k))

    x, cos = torch.ones(1, 2, 3, 8, device=DEVICE), torch.ones(1, 3, 8, device=DEVICE)
    with torch.device("meta"):
        assert rotary._is_rotary(own, x, cos)


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


def test_a_gradient_left_by_layers_is_taken_once() -> None:
    shared = SharedInput(torch.float32)
    shared.add(torch.ones(2, 3), torch.ones(3, 4))
    shared.add(torch.ones(2, 3), torch.ones(3, 4))
    taken = shared.take()
    assert taken is not None
    assert torch.equal(taken, torch.full((2, 4), 6.0))
    assert shared.take() is None
