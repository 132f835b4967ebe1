# SPDX-License-Identifier: Apache-2.0
"""What stands in for parts of models while passes run: the same numbers, and gone after it."""

from __future__ import annotations

import gc
import importlib
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _models import gpt2, llama, plain
from hullkit.language_model import fused_modules
from hullkit.language_model.fused_modules import stand_ins
from hullkit.language_model.saved_tensors import Saved
from torch import Tensor, nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.usefixtures("replaced_on_a_cpu")]
if DEVICE.type == "cuda":  # there they run on it
    pytestmark.append(pytest.mark.gpu)


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
    named = (*fused_modules._HEADS, *fused_modules._PASSING_ON, fused_modules._LOSS)
    for name in named:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


LAST = int(DEVICE.type == "cuda")  # there the last layer is left to the loss


@pytest.mark.parametrize(("make", "count"), [(gpt2, 3 + 2 * LAST), (llama, 10 + LAST), (plain, 0)])
def test_same_function(make: Any, count: int) -> None:
    """An activation in each of two blocks, Llama's gates and five norms, the loss; on a GPU the
    last layer, and the embedding where it has the same weight."""
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
        assert len(replaced(model)) == 3  # theirs, and the other activation; lm_head is not
    assert replaced(model) == [loss, own]


def test_options_of_the_loss_are_heeded() -> None:
    model = gpt2().to(DEVICE).eval()
    ids = torch.arange(2, 22, device=DEVICE)[None]
    options: dict[str, Any] = {"input_ids": ids, "labels": ids, "num_items_in_batch": 38}
    with stand_ins(model):
        loss = model(**options).loss
    assert loss.item() == pytest.approx(model(**options).loss.item(), rel=1e-6)
    assert loss.item() == pytest.approx(passed(model)[0].item() / 2, rel=1e-6)


class Penalised(nn.Module):
    """Somebody who looks at the logits as well."""

    def __init__(self) -> None:
        super().__init__()
        self.model = gpt2()

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        out = self.model(input_ids=input_ids, labels=labels)
        return out.loss + 1e-4 * out.logits.square().mean()


@pytest.mark.gpu
def test_logits_that_somebody_sees_are_computed() -> None:
    model = Penalised().to(DEVICE).eval()
    ids = torch.arange(2, 22, device=DEVICE)[None]
    with stand_ins(model), torch.no_grad():
        assert "forward" not in model.model.lm_head.__dict__
        loss = model(ids, ids)
    torch.testing.assert_close(loss, model(ids, ids).detach(), rtol=1e-6, atol=0)
    inner = model.model
    seen: list[Tensor] = []
    handle = inner.lm_head.register_forward_hook(lambda module, args, out: seen.append(out))
    with stand_ins(inner), torch.no_grad():
        inner(input_ids=ids, labels=ids)
    handle.remove()
    assert seen[0].shape[-1] == inner.config.vocab_size


@pytest.mark.parametrize("make", [gpt2, llama])
def test_activations_are_computed_again(make: Any) -> None:
    """The same bits, less memory, and none of it kept by what is left of the pass."""
    model = make().to(DEVICE).eval()
    ids = torch.arange(2, 22, device=DEVICE)[None]

    class Counting(Saved):
        def __init__(self) -> None:
            super().__init__()
            self.kept: dict[int, int] = {}

        def keep(self, tensor: Tensor) -> Any:
            storage = tensor.untyped_storage()
            self.kept[storage.data_ptr()] = storage.nbytes()
            return tensor

    def run(saved: Saved | None, counting: Counting) -> tuple[Tensor, list[Tensor]]:
        with stand_ins(model, saved), counting.hooks():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            held = sum(counting.kept.values())
            sizes.append(held)
            loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return loss.detach(), grads

    sizes: list[int] = []
    counting = Counting()
    loss, grads = run(counting, counting)
    wanted, wanted_grads = run(None, Counting())
    assert torch.equal(loss, wanted)
    assert all(map(torch.equal, grads, wanted_grads))
    intermediate = getattr(model.config, "intermediate_size", 4 * model.config.hidden_size)
    # Two blocks. On a GPU Llama's gate is one function, which never has this output.
    gated = make is llama and DEVICE.type == "cuda"
    assert sizes[1] - sizes[0] == (0 if gated else 2 * 20 * 4 * intermediate)


def test_an_output_that_was_written_to_is_kept() -> None:
    gradients = []
    for saved in (None, Saved()):
        x = torch.linspace(-2.0, 2.0, 5, requires_grad=True)
        with saved.hooks() if saved else nullcontext():
            y = saved.cheap(F.silu, x * 1.0) if saved else F.silu(x * 1.0)
            y.mul_(3.0)
            (y * y).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_a_pass_that_fails_leaves_no_graph() -> None:
    """Though tanh saves what it returns. A node that lives on keeps its stream, for one."""
    weight = torch.randn(3, requires_grad=True)
    with Saved().hooks():
        node = torch.autograd.graph.get_gradient_edge(weight).node
        node.metadata["former"] = True
        torch.tanh(weight * 2.0)
    del node
    gc.disable()
    try:
        assert "former" not in torch.autograd.graph.get_gradient_edge(weight).node.metadata
    finally:
        gc.enable()


def test_what_the_gradient_needs_must_not_be_written_to() -> None:
    """Autograd itself does not look where hooks are."""
    weight = torch.randn(5, requires_grad=True)
    for cheap in (True, False):
        saved = Saved()
        x = torch.randn(5)
        with saved.hooks():
            y = saved.cheap(F.silu, x) if cheap else x
            loss = (y * weight).sum()
        x.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


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


def test_torchs_default_device_does_not_matter() -> None:
    """Modules are tried on numbers of the CPU's; the same ones are replaced."""
    found = []
    for device in ("cpu", "meta"):
        model = llama().to(DEVICE).eval()
        with torch.device(device), stand_ins(model) as names:
            loss, grads = passed(model)
        found.append((set(names), loss, *grads))
    (names, *wanted), (other, *results) = found
    assert names == other
    for part in ("LlamaMLP", "LlamaRMSNorm"):
        assert any(name.endswith(f"{part}.forward") for name in names)
    assert all(map(torch.equal, results, wanted))
