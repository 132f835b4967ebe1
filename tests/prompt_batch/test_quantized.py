# SPDX-License-Identifier: Apache-2.0
"""Bases of bitsandbytes, in 8 and 4 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _models import llama
from _prompts import DEVICE, batch_of, query, text
from _quantized import dequantized, quantized

bitsandbytes = pytest.importorskip("bitsandbytes", reason="not installed")
peft = pytest.importorskip("peft", reason="an extra is not installed")

pytestmark = [pytest.mark.usefixtures("one_thread")]
if DEVICE.type == "cuda":
    pytestmark += [pytest.mark.gpu]


# PEFT asks transformers by a name that transformers has since deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
# bitsandbytes on its own ways: a cast of inputs to float16, a kernel that a CPU lacks.
@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_slots_learn_as_on_the_dequantised_base(kind: str, tmp_path: Path) -> None:
    queries = [query(seed) for seed in range(3)]
    model = quantized(kind)
    wanted = [a.losses for a in batch_of(dequantized(model, kind), 3).map(queries)]
    before = {name: t.clone() for name, t in model.state_dict().items() if torch.is_tensor(t)}
    batch = batch_of(model, 3, capture=False)  # LLM.int8() asks the device for outliers
    answers = batch.adapt_(queries)
    # On a GPU 8-bit layers round their inputs to 8 bits, too.
    bound = 2e-2 if kind == "int8" and DEVICE.type == "cuda" else 1e-4
    for answer, losses in zip(answers, wanted, strict=True):
        assert answer.error is None, answer.error
        assert answer.losses == pytest.approx(losses, rel=bound)
    for name, tensor in model.state_dict().items():
        assert not torch.is_tensor(tensor) or torch.equal(tensor, before[name])
    ids = text(12, 0).to(DEVICE)[None]
    with batch.slot(1) as adapted, torch.no_grad():
        ours = adapted(ids).logits
    batch.export(1, tmp_path)
    loaded = peft.PeftModel.from_pretrained(quantized(kind), str(tmp_path)).eval()
    for module in loaded.modules():  # no product in bfloat16, which some CPUs have
        module.__dict__.update(support_avx512bf16_for_cpu=False)
    with torch.no_grad():
        torch.testing.assert_close(ours, loaded(ids).logits, rtol=1e-3, atol=1e-3)


def test_a_weight_that_was_not_quantised_is_refused() -> None:
    model = llama()
    model.model.layers[0].mlp.up_proj = bitsandbytes.nn.Linear4bit(16, 24, bias=False)
    with pytest.raises(ValueError, match="expected a quantised weight in"):
        batch_of(model, 1)
