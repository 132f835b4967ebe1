# SPDX-License-Identifier: Apache-2.0
"""Which gradients of adapters a warm-up takes, so that a capture may have them written late."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hullkit.finetune.capture_memory import NotedGradients, hooks
from hullkit.language_model.fused_modules import stand_ins
from torch import Tensor, nn

peft = pytest.importorskip("peft", reason="an extra is not installed")


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        y: Tensor = self.o(self.q(x) * self.k(x))
        return y


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, target_modules=["q", "k", "o"])
    return peft.get_peft_model(Layers(), config).eval()


def factor(model: Any, name: str) -> nn.Parameter:
    layer, _, kind = name.partition(".")
    found: nn.Parameter = getattr(getattr(model.base_model.model, layer), kind)["default"].weight
    return found


def taken(model: Any, extra: nn.Parameter | None = None) -> set[str]:
    """The factors whose gradient was taken, and nothing else."""
    noted = NotedGradients()
    x = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    with hooks(trained, noted.note):
        for _ in range(2):  # as after a pass that was too large
            noted.clear()
            with stand_ins(model, backend="triton", products=noted):
                loss = model(x).square().sum()
            if extra is not None:
                loss = loss + extra.square().sum()
            loss.backward()
    assert noted.order.keys() == {*trained}
    assert all(p.grad is None for p in trained)
    names = {id(p): name for name, p in model.named_parameters()}
    short = {
        p: names[id(p)].removeprefix("base_model.model.").removesuffix(".default.weight")
        for p in trained
    }
    return {short[p] for p, gradient in noted.order.items() if gradient.is_taken}


ALL = {f"{layer}.lora_{kind}" for layer in "qko" for kind in "AB"}


def test_each_factors_gradient_is_taken(model: Any) -> None:
    assert taken(model) == ALL


def test_a_factor_of_two_layers(model: Any) -> None:
    model.base_model.model.k.lora_A["default"].weight = factor(model, "q.lora_A")
    assert taken(model) == ALL - {"q.lora_A", "k.lora_A"}


def test_a_factor_that_the_loss_reads_too(model: Any) -> None:
    assert taken(model, extra=factor(model, "o.lora_B")) == ALL - {"o.lora_B"}


def test_factors_whose_gradients_somebody_waits_for(model: Any) -> None:
    seen: list[Tensor] = []
    factor(model, "q.lora_A").register_hook(seen.append)
    factor(model, "k.lora_B").register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    assert taken(model) == ALL - {"q.lora_A", "k.lora_B"}
    assert len(seen) == 4
    assert all(gradient.isfinite().all() for gradient in seen)


def test_a_frozen_factor(model: Any) -> None:
    factor(model, "q.lora_B").requires_grad_(False)
    assert taken(model) == ALL - {"q.lora_B"}


def test_an_input_without_a_gradient(model: Any) -> None:
    """What its readers' gradients wait for does not come; they are made at once."""
    block = model.base_model.model
    block.forward = lambda x: Layers.forward(block, x.detach())
    assert taken(model) == ALL
