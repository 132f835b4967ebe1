"""What stands in for parts of models while passes run: the same numbers, and gone after it."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from _models import gpt2, llama, plain
from hullkit import _stand_ins
from hullkit._stand_ins import stand_ins
from torch import Tensor, nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []  # there they run on it


def replaced(model: nn.Module) -> list[Any]:
    names = ("forward", "_loss_function")
    return [m.__dict__[name] for m in model.modules() for name in names if name in m.__dict__]


def passed(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    ids = torch.arange(2, 22, device=DEVICE)[None]
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    for parameter in model.parameters():
        parameter.grad = None
    return loss.detach(), grads


def test_the_classes_exist() -> None:
    """Under these names, in the transformers that is installed; else nothing would be replaced."""
    for name in (*_stand_ins._FORWARDS, _stand_ins._LOSS):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


@pytest.mark.parametrize(("make", "count"), [(gpt2, 3), (llama, 6), (plain, 0)])
def test_same_function(make: Any, count: int) -> None:
    """GPT-2: an activation in each of two blocks; Llama: five norms; and the loss of both."""
    model = make().to(DEVICE).eval()
    with stand_ins(model):
        assert len(replaced(model)) == count
        if count:
            loss, grads = passed(model)
    assert not replaced(model)
    if count:
        wanted, wanted_grads = passed(model)
        torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
        for grad, other in zip(grads, wanted_grads, strict=True):
            assert float((grad - other).norm()) <= 1e-5 * float(other.norm()) + 1e-9


def test_an_error_leaves_nothing_behind() -> None:
    model = gpt2()
    with pytest.raises(KeyboardInterrupt), stand_ins(model):
        raise KeyboardInterrupt
    assert not replaced(model)


def test_what_somebody_else_replaced_stays() -> None:
    model = gpt2().to(DEVICE)
    activation = model.transformer.h[0].mlp.act
    activation.forward = own = type(activation).forward.__get__(activation)

    def loss(logits: Tensor, labels: Tensor, **sizes: Any) -> Tensor:
        return logits.sum() * 0.0 + 7.0

    model.loss_function = loss
    with stand_ins(model):
        assert activation.forward is own
        assert passed(model)[0] == 7.0
        assert len(replaced(model)) == 3  # theirs, and the other activation
    assert replaced(model) == [loss, own]


def test_options_of_the_loss_are_heeded() -> None:
    model = gpt2().to(DEVICE).eval()
    ids = torch.arange(2, 22, device=DEVICE)[None]
    options: dict[str, Any] = {"input_ids": ids, "labels": ids, "num_items_in_batch": 38}
    with stand_ins(model):
        loss = model(**options).loss
    assert loss.item() == pytest.approx(model(**options).loss.item(), rel=1e-6)
    assert loss.item() == pytest.approx(passed(model)[0].item() / 2, rel=1e-6)


@pytest.mark.gpu
def test_bf16_passes() -> None:
    for make in (gpt2, llama):
        model = make().to(DEVICE).eval()
        with torch.autocast("cuda", torch.bfloat16):
            with stand_ins(model):
                loss, grads = passed(model)
            wanted, wanted_grads = passed(model)
        torch.testing.assert_close(loss, wanted, rtol=1e-3, atol=0)
        for grad, other in zip(grads, wanted_grads, strict=True):
            assert float((grad - other).norm()) <= 0.02 * float(other.norm()) + 1e-6
