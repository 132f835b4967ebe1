# SPDX-License-Identifier: Apache-2.0
"""TestTimeFinetuner under autocast: its own, the model's, and the caller's.

torch keeps cast weights until the outermost autocast ends.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from _models import llama, texts
from hullkit import TestTimeFinetuner, bits_per_byte
from torch import Tensor, nn

COUNTS = [2, 3, 1]
pytestmark = pytest.mark.usefixtures("one_thread")


class OwnAutocast(nn.Module):
    """Its forward chooses the precision itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        with torch.autocast(input_ids.device.type, torch.bfloat16):
            return self.model(input_ids=input_ids, labels=labels)


def adapter(model: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def checkpointing(model: Any) -> nn.Module:
    model.gradient_checkpointing_enable()
    return model


MODELS = {
    "all weights": lambda model: model,
    "adapter": adapter,
    "own autocast": OwnAutocast,
    "checkpointing": checkpointing,
}


def losses_of_torch(model: nn.Module, device: str) -> list[float]:
    """The same updates by torch.optim, each pass under an autocast of its own."""
    model.eval()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    own = isinstance(model, OwnAutocast)
    for text, count in zip(texts(3), COUNTS, strict=True):
        ids = text.to(device)
        for _ in range(count):
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=not own):
                loss = model(input_ids=ids[None], labels=ids[None]).loss
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
    return losses


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("options", [{}, {"fuse": False}, {"activations": "recompute"}], ids=str)
@pytest.mark.parametrize("kind", list(MODELS))
def test_each_pass_casts_the_weights_it_finds(
    kind: str, options: dict[str, Any], outer: bool, device: str
) -> None:
    """On a GPU by captured passes, too: a graph may read nothing that was cast before."""
    model = MODELS[kind](llama()).to(device)
    precision = "float32" if kind == "own autocast" else "bf16"
    tuner = TestTimeFinetuner(model, lr=0.01, refresh_interval=1, precision=precision, **options)
    with torch.autocast(device, torch.bfloat16, enabled=outer):
        losses = tuner.adapt_(texts(3), COUNTS).losses
    wanted = losses_of_torch(MODELS[kind](llama()).to(device), device)
    # Halves, in other orders; fused kernels round less often.
    assert losses == pytest.approx(wanted, rel=2e-3 if device == "cpu" else 1e-2)
    assert losses[0] - losses[1] > 0.02  # stale weights would repeat a text's loss


def test_a_block_inside_the_callers_autocast() -> None:
    """What answered before the block has not cast weights for it, and it none for what follows."""
    model = llama()
    tuner = TestTimeFinetuner(model, lr=0.01)
    [text] = texts(1)

    def bits(model: nn.Module) -> float:
        return bits_per_byte(model, text, 8)

    def apart() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    with apart():
        before = bits(model)
    with tuner.adapted([text], [4]), apart():
        inside = bits(model)
    assert abs(inside - before) > 0.01
    with apart():
        assert bits(model) == before
        with tuner.adapted([text], [4]):
            assert bits(model) == inside
        assert bits(model) == before
        with suppress(ZeroDivisionError), tuner.adapted([text], [4]):
            assert bits(model) == inside
            raise ZeroDivisionError
        assert bits(model) == before
