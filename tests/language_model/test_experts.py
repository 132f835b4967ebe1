# SPDX-License-Identifier: Apache-2.0
"""Experts that see every token equal experts that see their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _architectures import NAMES as KNOWN
from _architectures import build
from hullkit.language_model.experts import every_expert, without_questions
from torch import Tensor, nn

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.plain_memory]
MIXTURES = [
    "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "glm4_moe", "gpt_oss", "granitemoe",
    "jamba", "minimax", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe",
]  # fmt: skip
NAMES = [name for name in MIXTURES if name in KNOWN]
IDS = torch.arange(3, 15)[None]


def mixture(name: str) -> Any:
    model: Any = build(name).double()
    model.set_experts_implementation("eager")
    for parameter in model.parameters():  # biases, too, are to matter
        nn.init.normal_(parameter, std=0.2)
    return model


def experts_of(model: nn.Module) -> list[nn.Module]:
    with without_questions(model):
        return [module for module in model.modules() if "forward" in vars(module)]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients(name: str) -> None:
    experts: Any = experts_of(mixture(name))[0]
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(9, 32, generator=generator, dtype=torch.float64)
    scores = torch.rand(9, experts.num_experts - 1, generator=generator, dtype=torch.float64)
    weights, index = scores.topk(2)  # the last expert gets no token
    results = []
    for run in (experts, lambda *inputs: every_expert(experts, *inputs)):
        inputs: list[Tensor] = [hidden.clone().requires_grad_(), weights.clone().requires_grad_()]
        output = run(inputs[0], index, inputs[1])
        gradients = torch.autograd.grad(output.square().sum(), [*inputs, *experts.parameters()])
        results.append((output, *gradients))
    for got, wanted in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_model(name: str) -> None:
    model = mixture(name)
    before = [dict(vars(module)) for module in model.modules()]
    with torch.no_grad():
        wanted = model(IDS, use_cache=False).logits
        with without_questions(model) as names:
            got = model(IDS, use_cache=False).logits
    assert len(names) == 1
    assert names[0].endswith("Experts.forward")
    assert [dict(vars(module)) for module in model.modules()] == before
    # Norms and routers of many models compute in float32 whatever the dtype.
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_models_without_experts_are_left_alone() -> None:
    for name in ("llama", "jetmoe"):
        with without_questions(build(name)) as names:
            assert names == ()


def test_the_list_is_complete() -> None:
    assert [name for name in KNOWN if experts_of(build(name))] == NAMES
