# SPDX-License-Identifier: Apache-2.0
"""Models that go through torch.compile already, as a whole or in part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from _models import distance, gpt2, llama, plain, state
from hullkit.finetune import TestTimeFinetuner
from hullkit.language_model.fused_modules import stand_ins
from torch import nn

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # which dynamo reads
]
IDS = torch.arange(3, 16)


def as_a_whole(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def wrapped(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def last_layer(model: nn.Module) -> nn.Module:
    model.lm_head.compile(backend="eager")
    return model


def forward(model: nn.Module) -> nn.Module:
    model.lm_head.forward = torch.compile(model.lm_head.forward, backend="eager")
    return model


COMPILED = [as_a_whole, wrapped, last_layer, forward]


def query(model: nn.Module, **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    tuner = TestTimeFinetuner(model, lr=1e-2, **options)
    with tuner.adapted([IDS], [2]) as adapted:
        weights = state(getattr(adapted, "_orig_mod", adapted))
    return tuner.last_report, weights


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("build", [llama, gpt2])
def test_the_same_as_the_model_itself(
    build: Callable[[], nn.Module], compiled: Callable[[nn.Module], nn.Module]
) -> None:
    if torch.__version__.startswith("2.6") and compiled in (as_a_whole, wrapped):
        pytest.skip("torch 2.6 cannot compile a whole model of transformers 5")
    torch._dynamo.reset()
    wanted, weights = query(build(), fuse=False)
    report, found = query(compiled(build()))
    assert report.fused == ()
    assert report.losses == pytest.approx(wanted.losses, rel=1e-5)
    assert distance(found, weights) <= 1e-5


@pytest.mark.parametrize("compiled", COMPILED)
def test_nothing_is_replaced_where_kernels_could_run(
    compiled: Callable[[nn.Module], nn.Module],
) -> None:
    model = compiled(llama())
    before = [vars(module).get("forward") for module in model.modules()]
    with stand_ins(model, backend="triton") as names:
        assert not names
        assert [vars(module).get("forward") for module in model.modules()] == before
        assert not torch.overrides._get_current_function_mode_stack()


def test_a_function_that_the_compiler_leaves_alone_is_none_of_its() -> None:
    model = llama()
    model.lm_head.forward = torch.compiler.disable(model.lm_head.forward)
    with stand_ins(model, backend="triton") as names:
        assert any(name.endswith("LlamaRMSNorm.forward") for name in names)


def test_the_compiler_decides_what_is_kept() -> None:
    model = plain()
    tuner = TestTimeFinetuner(model, activations="recompute")
    model.compile(backend="eager")
    with pytest.raises(ValueError, match=r"activations: .* for a compiled model, got 'recompute'"):
        tuner.adapted([IDS], [1])


def test_a_cpu_has_nothing_to_replace_with() -> None:
    model = llama()
    with stand_ins(model) as names:
        assert not names
        assert not torch.overrides._get_current_function_mode_stack()
