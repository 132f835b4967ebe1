# SPDX-License-Identifier: Apache-2.0
"""Parameters without `requires_grad` have no copy: a write to one is an error."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from _models import COUNTS, PlainLM, llama, plain, rwkv, texts
from hullkit.finetune import TestTimeFinetuner
from torch import Tensor, nn

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}


def test_a_write_in_the_block_is_told() -> None:
    model = plain()
    before = values(model)
    block = TestTimeFinetuner(model, lr=1e-2).adapted(texts(), COUNTS)
    told = pytest.raises(RuntimeError, match=r"write to 'frozen\.bias' of shape \(12,\)")
    with told, block, torch.no_grad():
        model.frozen.bias.add_(1.0)
    assert changed(model, before) == {"frozen.bias"}


def test_a_frozen_tensor_of_inference_mode_counts_no_writes() -> None:
    model = plain()
    with torch.inference_mode():
        other = nn.Parameter(torch.ones(12), requires_grad=False)
    before = values(model)
    with TestTimeFinetuner(model, lr=1e-2).adapted(texts(), COUNTS):
        torch.utils.swap_tensors(model.frozen.bias, other)
    assert not changed(model, before)


class Rescales(PlainLM):
    """Its forward writes to a frozen weight."""

    def forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            self.frozen.weight.mul_(0.5)
        return super().forward(ids)


@pytest.mark.parametrize("device", DEVICES)
def test_a_write_in_a_pass_is_told_before_the_block(device: str) -> None:
    """Each time: a graph would write again, and count nothing."""
    torch.manual_seed(0)
    model = Rescales().to(device)
    before = values(model)
    tuner = TestTimeFinetuner(model, lr=1e-2)
    told = r"write to 'frozen\.weight'"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=told), tuner.adapted(texts(), COUNTS):
            pytest.fail("the block was entered")
        with pytest.raises(RuntimeError, match=told):
            tuner.adapt_(texts(), COUNTS)
    assert changed(model, before) == {"frozen.weight"}


def with_adapters(model: Any, names: Any, **options: Any) -> Any:
    peft = pytest.importorskip("peft", reason="an extra is not installed")
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names, **options)).eval()


def test_adapters_of_parameters_write_nothing() -> None:
    """PEFT parametrises such a parameter in each pass, which counts as a write."""
    model = with_adapters(plain(), [], target_parameters=["frozen.weight"])
    before = values(model)
    with TestTimeFinetuner(model, lr=1e-2).adapted(texts(), COUNTS):
        assert changed(model, before) > {"base_model.model.frozen.lora_B.default.weight"}
    assert not changed(model, before)


def test_adapters_are_merged_in_a_copy() -> None:
    """PEFT writes to `.data`, where nobody counts."""
    model = with_adapters(llama(), "all-linear")
    before, ids = values(model), texts()[0][None]
    base = model(ids).logits
    with TestTimeFinetuner(model, lr=1e-2).adapted(texts(), COUNTS) as adapted:
        logits = adapted(ids).logits
        for merge in (adapted.merge_adapter, adapted.unmerge_adapter, adapted.merge_and_unload):
            with pytest.raises(RuntimeError, match=r"merge: .*copy.deepcopy\(model\)"):
                merge()
        merged = copy.deepcopy(adapted)
        merged.merge_adapter()
    assert not changed(model, before)
    torch.testing.assert_close(merged(ids).logits, logits)
    assert (logits - base).abs().max() > 1e-3
    model.merge_adapter()  # it is the user's again


def test_rwkv_is_to_have_rescaled_its_weights() -> None:
    model = with_adapters(rwkv(), ["key"])
    before, tuner = values(model), TestTimeFinetuner(model, lr=1e-2)
    with pytest.raises(ValueError, match=r"expected weights as RWKV has them in eval mode.*rwkv"):
        tuner.adapt_(texts(), COUNTS)
    assert not changed(model, before)
    model(texts()[0][None])
    before = values(model)
    for _ in range(2):
        with tuner.adapted(texts(), COUNTS):
            pass
        assert not changed(model, before)


def test_rwkv_without_rescaling_is_taken_as_it_is() -> None:
    model = with_adapters(rwkv(rescale_every=0), ["key"])
    before = values(model)
    with TestTimeFinetuner(model, lr=1e-2).adapted(texts(), COUNTS):
        assert changed(model, before)
    assert not changed(model, before)


def test_rwkv_may_be_trained_as_a_whole() -> None:
    model = rwkv()
    before = values(model)
    with TestTimeFinetuner(model, lr=1e-2).adapted(texts(), COUNTS):
        assert model.rwkv.layers_are_rescaled
    assert not changed(model, before)
    assert not model.rwkv.layers_are_rescaled
