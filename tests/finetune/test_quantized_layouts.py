# SPDX-License-Identifier: Apache-2.0
"""4-bit bases keep their weights' layout, which bitsandbytes changes in eval mode on some CPUs.

Layers are told that this machine is such a CPU. Their product in bfloat16 may be missing here, so
nothing may ask for it either.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from _prompts import DEVICE, batch_of, query, text
from _quantized import bitsandbytes, dequantized, quantized
from hullkit import TestTimeFinetuner
from hullkit.prompt_batch.quantized import weight_of
from torch import nn

peft = pytest.importorskip("peft", reason="an extra is not installed")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(DEVICE.type != "cpu", reason="a layout of CPUs"),
    # PEFT asks transformers by a name that transformers has since deprecated.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
IDS = torch.arange(1, 13)[None]


def layers_of(model: nn.Module) -> list[Any]:
    found = [m for m in model.modules() if type(m).__module__.startswith("bitsandbytes")]
    for layer in found:
        layer.support_avx512bf16_for_cpu = True
    return found


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    layers = layers_of(model)
    before = [layer.weight.data.clone() for layer in layers]
    yield
    for layer, weight in zip(layers, before, strict=True):
        assert torch.equal(layer.weight.data, weight)
        assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
        assert layer.support_avx512bf16_for_cpu


def with_adapter(model: nn.Module) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def losses(model: nn.Module, keep: bool = False) -> tuple[float, ...]:
    tuner = TestTimeFinetuner(model, lr=1e-2)
    examples, counts = [text(20, 0), text(15, 1)], [3, 2]
    if keep:
        report = tuner.adapt_(examples, counts)
    else:
        with tuner.adapted(examples, counts) as adapted, torch.no_grad():
            adapted(IDS)
        report = tuner.last_report
    assert report is not None
    return tuple(report.losses)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_finetuner_keeps_the_layout(kind: str, keep: bool) -> None:
    model = quantized(kind)
    wanted = losses(with_adapter(dequantized(model, kind)), keep)
    with unchanged(model):
        found = losses(with_adapter(model), keep)
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_batch_keeps_the_layout(kind: str) -> None:
    model = quantized(kind)
    with unchanged(model):
        batch = batch_of(model, 2)
        [answer] = batch.adapt_([query(0)])
        assert answer.error is None, answer.error
        with batch.slot(0) as adapted, torch.no_grad():
            adapted(IDS)


@pytest.mark.skipif(
    not hasattr(bitsandbytes.functional, "_convert_weight_packed_for_cpu"),
    reason="a version without the layout",
)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("target", ["all-linear", ["q_proj"]])
def test_weights_that_had_the_other_layout(kind: str, nested: bool, target: Any) -> None:
    model = quantized(kind, nested)
    layers = layers_of(model)
    exact = [weight_of(layer, torch.float32) for layer in layers]
    for layer in layers:
        pack = bitsandbytes.functional._convert_weight_packed_for_cpu
        weight = layer.weight
        weight.data, weight.quant_state = pack(weight.data, weight.quant_state)
    states = [layer.weight.quant_state for layer in layers]
    before = [t.clone() for x in layers for t in (x.weight.data, x.weight.quant_state.absmax)]
    for layer, wanted in zip(layers, exact, strict=True):  # the layout holds scales in bfloat16
        found = weight_of(layer, torch.float32)
        assert float((found - wanted).norm() / wanted.norm()) < 0.05  # scales of scales: 8 bits

    def check() -> None:
        after = [t for x in layers for t in (x.weight.data, x.weight.quant_state.absmax)]
        assert all(map(torch.equal, before, after))
        for layer, state in zip(layers, states, strict=True):
            assert layer.weight.quant_state is state
            assert state.packing_format_for_cpu

    dense = dequantized(model, kind)
    batches = [batch_of(x, 2, target=target) for x in (dense, model)]
    answers = [batch.adapt_([query(0)])[0] for batch in batches]
    assert all(answer.error is None for answer in answers)
    assert answers[1].losses == pytest.approx(answers[0].losses, rel=1e-4)
    check()
    wanted_losses = losses(with_adapter(dense))
    assert losses(with_adapter(model)) == pytest.approx(wanted_losses, rel=1e-5)
    check()
