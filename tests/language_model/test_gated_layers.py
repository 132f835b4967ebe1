# SPDX-License-Identifier: Apache-2.0
"""Gated layers in passes: which modules are found to be one, and what they compute then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hullkit.language_model.fused_modules import stand_ins
from hullkit.language_model.gated_layers import GatedLayer
from hullkit.language_model.proofs import proof
from hullkit.triton_kernels.launch import launch
from torch import Tensor, nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []  # there they run on it


class Gated(nn.Module):
    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up_proj, self.gate_proj = nn.Linear(16, 24), nn.Linear(16, 24, bias=False)
        self.down_proj = nn.Linear(24, 16)
        self.act_fn = nn.SiLU() if act is None else act
        self.limit = 7.0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


class Clipped(Gated):
    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x).clamp(max=self.limit)
        y: Tensor = self.down_proj(self.act_fn(gate) * self.up_proj(x))
        return y


class OneMore(Gated):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + 1.0))
        return y


class OnePercentMore(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return 1.01 * super().forward(x)


class Plus(Gated):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return x + y


class Steep(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Wide(nn.Module):
    """Its result is in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x.float())


NAMES = ("gate_proj", "up_proj", "down_proj", "act_fn")


@pytest.mark.parametrize(
    ("act", "name"),
    [(nn.SiLU(), "silu"), (nn.GELU(), "gelu"), (nn.GELU(approximate="tanh"), "gelu_tanh")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gated_layer_computes_the_same(act: nn.Module, name: str, dtype: torch.dtype) -> None:
    layer = Gated(act).to(DEVICE, dtype)
    assert proof(layer) == GatedLayer(*NAMES, name)
    x = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    results = []
    for fused in (True, False):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        if fused:
            with stand_ins(layer, backend="triton") as names:
                y = layer(leaf)
            assert any(n.endswith("Gated.forward") for n in names)
            assert not any("silu" in n or "gelu" in n for n in names)
        else:
            y = layer(leaf)
        y.sum().backward()
        found = [y.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters())]
        results.append(found)
    for mine, theirs in zip(*results, strict=True):
        # Of bfloat16 both sides round, and the interpreter cuts.
        bound = (32.0 if dtype is torch.float32 else 4.0) * torch.finfo(dtype).eps
        assert float((mine - theirs).abs().max()) <= bound * float(theirs.abs().max())


@pytest.mark.parametrize(
    "layer", [Clipped(), OneMore(), Plus(), Gated(Steep()), Gated(Wide()), Gated(nn.ReLU())]
)
def test_others_are_refused(layer: nn.Module) -> None:
    assert proof(layer) is None


def test_what_changes_later() -> None:
    layer: Any = Gated()
    assert isinstance(proof(layer), GatedLayer)
    layer.act_fn.inplace = True  # still the formula, and nobody sees what is written to
    assert isinstance(proof(layer), GatedLayer)
    layer.act_fn = Steep()
    assert proof(layer) is None
    layer.act_fn = nn.GELU()
    assert proof(layer) == GatedLayer(*NAMES, "gelu")
    layer.act_fn.approximate = "tanh"
    assert proof(layer) == GatedLayer(*NAMES, "gelu_tanh")
    handle = layer.act_fn.register_forward_hook(lambda *_: None)
    assert proof(layer) is None  # somebody wants to see what it returns
    handle.remove()
    assert isinstance(proof(layer), GatedLayer)
    layer.register_buffer("scale", torch.ones(1))
    assert proof(layer) is None


def test_parts_are_called_as_they_are() -> None:
    """An adapter or a hook of a linear part is not passed by."""
    layer = Gated().to(DEVICE)
    x = torch.randn(1, 3, 16, device=DEVICE, requires_grad=True)
    seen = []
    layer.gate_proj.register_forward_hook(lambda *_: seen.append("gate"))
    layer.down_proj.register_forward_hook(lambda _, __, y: y + 1.0)
    wanted = layer(x)
    with stand_ins(layer, backend="triton"):
        found = layer(x)
    assert seen == ["gate"] * 2
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_proof_is_as_sharp_whatever_torchs_default_dtype_is(dtype: torch.dtype) -> None:
    layer, other = Gated(), OnePercentMore()
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert proof(layer) == GatedLayer(*NAMES, "silu")
        assert proof(other) is None
    finally:
        torch.set_default_dtype(default)


def test_the_activation_is_rounded_before_it_is_multiplied() -> None:
    """As the model rounds it, also where what it is multiplied with is wider."""
    gate = torch.randn(1000).to(DEVICE, torch.bfloat16)
    up = torch.full((1000,), 3.0, device=DEVICE)
    out, gate_gradient, up_gradient = (torch.empty_like(up) for _ in range(3))
    launch("gate", 1, (gate, up, out, 1000), {"KIND": "silu"})
    launch("gate_gradient", 1, (gate, up, up, gate_gradient, up_gradient, 1000), {"KIND": "silu"})
    for product in (out, up_gradient):
        assert torch.equal((product / 3.0).bfloat16().float() * 3.0, product)
