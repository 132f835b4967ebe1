# SPDX-License-Identifier: Apache-2.0
"""Captured passes of adapters, whose gradients are made with those of their layers' inputs."""

from __future__ import annotations

from typing import Any

import hullkit
import pytest
import torch
from hullkit.language_model import loss
from hullkit.native import kernels
from torch import Tensor, nn

peft = pytest.importorskip("peft", reason="an extra is not installed")
pytestmark = pytest.mark.gpu
WIDTH, TOKENS, VOCABULARY = 256, 160, 32


class Layers(nn.Module):
    """A layer, and blocks of four: three read one input, and the last theirs."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = blocks
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, 2 * WIDTH) for _ in range(3))
        self.o = nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.embedding(ids)))
        for _ in range(self.blocks):  # of the same layers
            x = torch.tanh(x + self.o(torch.tanh(self.q(x)) * self.k(x) + self.v(x)))
        logits: Tensor = self.head(x)
        return logits


def adapters(blocks: int, rank: int) -> Any:
    """With float32 factors on a bfloat16 model."""
    names = ["first", "q", "k", "v", "o"]
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
    model = peft.get_peft_model(Layers(blocks).bfloat16(), config).to("cuda").eval()
    generator = torch.Generator("cuda").manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02, generator=generator)
    return model


def moved(model: Any, **options: Any) -> tuple[list[Tensor], str]:
    """How far each factor goes in a step that is as long as its gradient, and the path."""
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    # With so large an eps a step is lr / eps times the gradient.
    tuner = hullkit.TestTimeFinetuner(model, lr=1e3, eps=1e3, **options)
    with tuner.adapted([torch.arange(TOKENS) * 7 % VOCABULARY], [1]):
        found = [p.detach() - old for p, old in zip(trained, before, strict=True)]
    assert tuner.last_report is not None
    return found, tuner.last_report.path


@pytest.mark.parametrize("rank", [8, 16, 128])
@pytest.mark.parametrize("blocks", [1, 2])
def test_captured_adapters_move_as_plain_ones(blocks: int, rank: int) -> None:
    """With two blocks each factor has two gradients."""
    model = adapters(blocks, rank)
    found, path = moved(model, capture=True)
    assert path == "captured"
    wanted, _ = moved(model, capture=False, fuse=False)
    for ours, theirs in zip(found, wanted, strict=True):
        largest = float(theirs.abs().max())
        assert largest > 0.0
        # Both round to bfloat16 eight times in a row, by up to half a unit.
        assert float((ours - theirs).abs().max()) <= 2 * 8 * 2**-9 * largest


def test_kept_passes_look_at_no_module_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """To look through a model with adapters takes longer than a pass: with two looks for each
    example a query of SmolLM2 took twice as long."""
    examples = [torch.arange(tokens) * 7 % VOCABULARY for tokens in (TOKENS, 96, 64)]
    tuner = hullkit.TestTimeFinetuner(adapters(1, 8))
    with tuner.adapted(examples, [1, 1, 1]):
        pass
    looks: list[nn.Module] = []
    monkeypatch.setattr(loss, "is_compiled", lambda model: bool(looks.append(model)))
    counted = []
    for few in (1, 3):
        looks.clear()
        with tuner.adapted(examples[:few], [1] * few):
            pass
        assert tuner.last_report is not None
        assert tuner.last_report.path == "captured"
        counted.append(len(looks))
    assert counted[0] == counted[1]


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
def test_gradients_of_factors_ride_on_the_products() -> None:
    if not kernels.product_sums_usable(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("no GPU that the kernel runs on")
    model = adapters(1, 16)
    ids = [torch.arange(TOKENS) % VOCABULARY]
    tuner = hullkit.TestTimeFinetuner(model, capture=True)
    tuner.adapt_(ids, [2])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        tuner.adapt_(ids, [2])
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    assert sum("product_sums" in name for name in names) == 5  # the first layer's input has no half
    assert sum("low_rank_expand_gradient" in name for name in names) == 3
    assert sum("low_rank_shrink_gradient" in name for name in names) == 1  # the first layer's
