# SPDX-License-Identifier: Apache-2.0
"""TestTimeFinetuner: the way back from every exit."""

from __future__ import annotations

import copy
import math
import signal
from typing import Any

import pytest
import torch
from _models import COUNTS, VOCABULARY, Before, FailingCall, PlainLM, injected, llama, plain, texts
from hullkit.finetune import TestTimeFinetuner, adaptation, capture_memory
from hullkit.finetune.eager_passes import Trained
from hullkit.optim import Adam
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_the_block_may_do_anything(error: type[BaseException] | None) -> None:
    model = plain()
    before = Before(model)

    def block() -> None:
        with TestTimeFinetuner(model).adapted(texts(), COUNTS), torch.no_grad():
            model.train()
            model(texts()[0][None])  # batch-norm statistics
            model.calls = model.calls + 7  # replaced
            model.register_buffer("extra", torch.zeros(3))
            model.norm.running_var = None
            model.head.weight = nn.Parameter(torch.zeros(VOCABULARY, 12))  # untied
            model.embedding.weight.fill_(math.nan)
            model.requires_grad_(False)
            model.norm.weight.requires_grad_(True).grad = torch.ones(12)
            model.bfloat16()
            if error is not None:
                raise error("from the block")

    if error is None:
        block()
    else:
        with pytest.raises(error, match="from the block"):
            block()
    before.check()


def test_a_container_that_loses_a_module_has_it_again() -> None:
    """It takes a new dict for the modules that it has left."""
    model = llama()
    layers = [*model.model.layers]
    with TestTimeFinetuner(model).adapted(texts(), COUNTS):
        del model.model.layers[0]
    assert [*model.model.layers] == layers


def test_a_vocabulary_that_the_block_resizes() -> None:
    """The new size stands in the configuration, too, of which the model's own loss takes it."""
    model = llama()
    before = dict(vars(model.config))
    with TestTimeFinetuner(model).adapted(texts(), COUNTS):
        model.resize_token_embeddings(VOCABULARY + 9, mean_resizing=False)
        assert model.config.vocab_size == VOCABULARY + 9
    assert vars(model.config) == before
    with TestTimeFinetuner(model).adapted(texts(), COUNTS):
        pass


INJECTED = [KeyboardInterrupt, torch.OutOfMemoryError, RuntimeError]
PHASES = [
    (torch.Tensor, "clone"),  # the snapshot
    (PlainLM, "forward"),
    (torch.Tensor, "backward"),
    (Adam, "__init__"),
    (Adam, "step_with"),
    (Trained, "zero_grad"),
]


@pytest.mark.parametrize("error", INJECTED)
@pytest.mark.parametrize(("owner", "name"), PHASES, ids=[name for _, name in PHASES])
@pytest.mark.parametrize("late", [False, True])
def test_failure_in_each_phase(
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
    owner: type,
    name: str,
    late: bool,
) -> None:
    model = plain()
    before = Before(model)
    tuner = TestTimeFinetuner(model, lr=1e-2)
    with tuner.adapted(texts(), COUNTS):
        assert tuner.last_report is not None
    before = Before(model)
    for failing in range(1, 100):
        assert failing < 99
        call = FailingCall(owner, name, error, failing, late)
        block = tuner.adapted(texts(), COUNTS)
        with monkeypatch.context() as patch:
            patch.setattr(*call.place)
            failed = injected(block, error)
        before.check()
        if call.calls < failing:  # every call has failed once
            break
        assert failed
        assert tuner.last_report is None
    assert failing > 1


def test_interrupt_raised_while_restoring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by SIGINT: by another signal's handler, say. Every write fails once, then goes on."""
    original = torch.Tensor.copy_
    model = plain()
    before = Before(model)
    fail_at = set(range(1, 60, 2))
    calls = 0

    def copy_(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls in fail_at:
            raise SystemExit("injected")
        return original(*args)

    with pytest.raises(SystemExit, match="injected"):  # noqa: PT012, SIM117
        with TestTimeFinetuner(model, lr=1e-2).adapted(texts(), COUNTS):
            fail_at = {1, 3, 7}
            calls = 0
            monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    assert calls > 7
    before.check()


def test_one_tensor_that_cannot_be_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.Tensor.copy_
    model = plain()
    before = Before(model)

    def copy_(tensor: Tensor, source: Tensor) -> Tensor:
        if tensor is model.norm.weight:
            raise RuntimeError("lost device")
        return original(tensor, source)

    with pytest.raises(RuntimeError, match="lost device"):  # noqa: SIM117
        with TestTimeFinetuner(model, lr=1e-2).adapted(texts(), COUNTS):
            monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    monkeypatch.undo()
    with torch.no_grad():
        model.norm.weight.copy_(before.bits["norm.weight"][2])
    before.check()  # all the others came back, and so did flags and gradients


def test_ctrl_c_in_the_block_is_immediate() -> None:
    model = plain()
    before = Before(model)
    with pytest.raises(KeyboardInterrupt), TestTimeFinetuner(model).adapted(texts(), COUNTS):  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the block went on")
    before.check()


def test_sigint_handlers_of_others_are_kept() -> None:
    calls: list[str] = []
    inside = lambda *_: calls.append("inside")  # noqa: E731
    previous = signal.signal(signal.SIGINT, lambda *_: calls.append("outside"))
    try:
        with TestTimeFinetuner(plain()).adapted(texts(), COUNTS):
            signal.raise_signal(signal.SIGINT)  # handed on
            signal.signal(signal.SIGINT, inside)
        assert signal.getsignal(signal.SIGINT) is inside
        assert calls == ["outside"]
    finally:
        signal.signal(signal.SIGINT, previous)


def test_a_device_that_is_lost_while_the_restoring_is_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Told once everything is back, the claim of the model and SIGINT's handler too."""
    model = plain()
    before = Before(model)
    for name in ("lap", "seconds"):
        with pytest.raises(RuntimeError, match="lost"), monkeypatch.context() as patch:  # noqa: PT012, SIM117
            with TestTimeFinetuner(model, lr=1e-2).adapted(texts(), COUNTS):

                def lost(*_: Any) -> None:
                    raise RuntimeError("lost")

                patch.setattr(adaptation.Clock, name, lost)
        before.check()


def test_hooks_are_removed_if_registering_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = list(plain().parameters())
    call = FailingCall(Tensor, "register_post_accumulate_grad_hook", KeyboardInterrupt, 3)
    monkeypatch.setattr(*call.place)
    with pytest.raises(KeyboardInterrupt), capture_memory.hooks(parameters, lambda _: None):
        pytest.fail("the block was entered")
    assert not any(p._post_accumulate_grad_hooks for p in parameters)


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2.0 * weight


@pytest.mark.parametrize("before", [False, True])
def test_a_parametrization_that_the_block_registers(before: bool) -> None:
    """It gives the module a class of its own, whose weight is a property."""
    model = plain()
    kind = type(model.frozen)
    if before:
        parametrize.register_parametrization(model.frozen, "weight", Twice())
        kind = type(model.frozen)
    with TestTimeFinetuner(model).adapted(texts(), COUNTS):
        parametrize.register_parametrization(model.frozen, "bias", Twice())
        model.embedding.__class__ = type("Other", (nn.Embedding,), {})
    assert type(model.frozen) is kind
    assert type(model.embedding) is nn.Embedding
    model(texts()[0][None])  # reads weight and bias
    if not before:
        copied = copy.deepcopy(model)
        copied.frozen.weight = nn.Parameter(torch.zeros(12, 12))


@pytest.mark.parametrize("trained", [True, False])
def test_a_parametrization_that_the_block_removes(trained: bool) -> None:
    """torch takes a property from the module's class."""
    model = plain()
    parametrizations.weight_norm(model.frozen)
    model.frozen.requires_grad_(trained)
    before = Before(model)
    with TestTimeFinetuner(model, lr=1e-2).adapted(texts(), COUNTS):
        parametrize.remove_parametrizations(model.frozen, "weight")
        assert not parametrize.is_parametrized(model.frozen)
    before.check()
    model(texts()[0][None])  # reads the property


@pytest.mark.parametrize("to", [torch.bfloat16, "meta"])
def test_a_block_that_swaps_tensors(to: Any) -> None:
    """torch refuses to swap one that somebody refers to weakly."""
    model = plain()
    before = Before(model)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with TestTimeFinetuner(model).adapted(texts(), COUNTS):
            model.to(to)
            other = nn.Parameter(torch.ones(3))
            torch.utils.swap_tensors(model.frozen.bias, other)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    before.check()


@pytest.mark.parametrize("dropped", [False, True])
def test_who_may_leave_is_said(dropped: bool) -> None:
    """A block that was entered by hand may be gone, and the base weights are then, too."""
    model = plain()
    block = TestTimeFinetuner(model).adapted(texts(), COUNTS)
    block.__enter__()
    held = [] if dropped else [block]
    del block
    other = nn.ModuleList([nn.Embedding(VOCABULARY, 12)])
    other[0].weight = model.embedding.weight
    for one in (model, other):
        with pytest.raises(RuntimeError, match="adapted") as refused:
            TestTimeFinetuner(one).adapt_(texts(), COUNTS)
        assert str(refused.value).endswith("load the model anew") == dropped
    if held:
        held[0].__exit__(None, None, None)
        TestTimeFinetuner(model).adapt_(texts(), COUNTS)
