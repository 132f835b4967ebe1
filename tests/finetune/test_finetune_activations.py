# SPDX-License-Identifier: Apache-2.0
"""Activations that are computed again: the layers it finds, the same result, and the way back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from _models import (
    COUNTS,
    VOCABULARY,
    Before,
    FailingCall,
    distance,
    gpt2,
    injected,
    llama,
    same_bits,
    state,
    texts,
)
from hullkit.finetune import TestTimeFinetuner
from hullkit.finetune.activations import CHOICES, ActivationPlan, ActivationsTooLarge
from hullkit.finetune.capture_memory import HeldTensors
from hullkit.language_model.loss import CausalLoss
from hullkit.language_model.recomputed_layers import recomputing, repeated_layers
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def test_layers_are_found_by_what_they_are() -> None:
    def layer() -> nn.Module:
        return nn.Sequential(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]))

    layers = [layer(), layer()]
    mixed = nn.ModuleList([nn.Linear(2, 2), nn.Tanh()])
    single = nn.ModuleList([nn.Linear(2, 2)])
    model = nn.Sequential(mixed, single, nn.Sequential(nn.ModuleList(layers)))
    assert repeated_layers(model) == layers
    known = llama()
    assert repeated_layers(known) == list(known.model.layers)


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_recomputed_passes_have_the_same_bits(
    build: Callable[[], nn.Module], precision: str
) -> None:
    model = build()
    before = Before(model)
    results = []
    for activations in ("keep", "recompute"):
        tuner = TestTimeFinetuner(
            model, lr=1e-2, fuse=False, precision=precision, activations=activations
        )
        with tuner.adapted(texts(), COUNTS):
            results.append(state(model))
        before.check()
    kept, again = results
    assert all(same_bits(kept[name], again[name]) for name in kept)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("build", [llama, gpt2], ids=["named cache", "unnamed cache"])
def test_a_cache_is_filled_once(build: Callable[[], nn.Module]) -> None:
    """PEFT's learned prefixes are the beginning of a cache, to which each layer appends."""
    peft = pytest.importorskip("peft", reason="an extra is not installed")
    config = peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    check_same_bits(lambda: peft.get_peft_model(build(), config))


def test_hooks_of_the_first_run_serve_the_second() -> None:
    """PEFT registers those of an activated LoRA for the forward half alone."""
    peft = pytest.importorskip("peft", reason="an extra is not installed")
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        init_lora_weights=False,
        alora_invocation_tokens=texts(1)[0][3:5].tolist(),
        task_type="CAUSAL_LM",
    )
    model = check_same_bits(lambda: peft.get_peft_model(llama(), config))
    assert not any(module._forward_pre_hooks for module in model.modules())


def check_same_bits(build: Callable[[], nn.Module]) -> nn.Module:
    """That passes which run layers again train the model as others do; returns one of them."""
    results = []
    for activations in ("keep", "recompute"):
        torch.manual_seed(0)
        model = build()
        tuner = TestTimeFinetuner(model, lr=1e-2, fuse=False, activations=activations)
        tuner.adapt_(texts(1), [2])
        results.append(state(model))
    assert all(same_bits(results[0][name], results[1][name]) for name in results[0])
    return model


class Random(nn.Module):
    """Its layers have dropout in eval mode too, as where uncertainty is estimated."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
        self.layers = nn.ModuleList([Dropped(), Dropped()])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(x)
        return out


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(torch.tanh(self.linear(x)), 0.5, training=True)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_layers_draw_the_same_random_numbers_again(device: str) -> None:
    results = []
    for activations in ("keep", "recompute"):
        tuner = TestTimeFinetuner(
            Random().to(device), activations=activations, lr=1e-2, capture=False
        )
        torch.manual_seed(1)
        tuner.adapt_(texts(), COUNTS)
        results.append(state(tuner.model))
    # A GPU adds up an embedding's gradient in any order.
    assert distance(*results) <= (0.0 if device == "cpu" else 1e-5)


@pytest.mark.gpu
def test_random_layers_are_not_recorded_to_run_again() -> None:
    """A capture could not set the random numbers back."""
    tuner = TestTimeFinetuner(Random().cuda(), activations="recompute", lr=1e-2)
    with pytest.warns(UserWarning, match="not captured: .*Dropped draws random numbers"):
        report = tuner.adapt_(texts(), COUNTS)
    assert report.path == "eager"
    tuner = TestTimeFinetuner(Random().cuda(), lr=1e-2)
    assert tuner.adapt_(texts(), COUNTS).path == "captured"


def test_a_checkpointed_layer_draws_the_same_random_numbers_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: F.dropout(own(self, x), 0.5))
    results = []
    for on in (False, True):
        model = llama()
        if on:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        TestTimeFinetuner(model, lr=1e-2, fuse=False).adapt_(texts(), COUNTS)
        results.append(state(model))
    assert all(same_bits(results[0][name], results[1][name]) for name in results[0])


def test_layers_run_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    own = LlamaDecoderLayer.forward

    def forward(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        return own(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    for activations, wanted in (("keep", 2), ("recompute", 4)):
        calls = 0
        TestTimeFinetuner(llama(), activations=activations).adapt_(texts(1), [1])
        assert calls == wanted


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_everything_is_back_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    model = llama()
    before = Before(model)
    tuner = TestTimeFinetuner(model, activations="recompute")
    for failing in range(1, 100):
        call = FailingCall(LlamaDecoderLayer, "forward", error, failing)
        with monkeypatch.context() as patch:
            patch.setattr(*call.place)
            failed = injected(tuner.adapted(texts(), COUNTS), error)
        before.check()
        if call.calls < failing:
            break
        assert failed
    assert failing > 4


def test_forwards_are_back_after_the_block() -> None:
    """Without a snapshot, which would put them back too."""
    layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
    wrapped = layers[1].forward
    layers[1].forward = wrapped
    with pytest.raises(KeyError, match="injected"), recomputing(layers):  # noqa: PT012
        assert all(layer.__dict__["forward"] is not wrapped for layer in layers)
        raise KeyError("injected")
    assert "forward" not in layers[0].__dict__
    assert layers[1].__dict__["forward"] is wrapped


def test_longer_texts_than_one_that_did_not_fit_are_recomputed() -> None:
    short, long = ({"input_ids": torch.zeros(1, tokens)} for tokens in (4, 8))
    always = {"auto": (False, False), "keep": (False, False), "recompute": (True, True)}
    for choice in CHOICES:
        plan = ActivationPlan(choice)
        assert (plan.recomputes(short), plan.recomputes(long)) == always[choice]
        assert plan.may_recompute(long) is (choice == "auto")
    plan = ActivationPlan("auto")
    plan.note_too_large(long)
    assert (plan.recomputes(short), plan.recomputes(long)) == (False, True)
    assert not plan.may_recompute(long)


@pytest.mark.parametrize("room", [0, 1 << 40])
def test_a_warm_up_counts_what_a_pass_holds(room: int) -> None:
    """Counted alike on the device and on the host; the gradients are those of a plain pass."""
    model = gpt2().eval()
    inputs = {"input_ids": texts(1)[0][None], "labels": texts(1)[0][None]}
    loss_of = CausalLoss(model, "float32", compile=False, fuse=False)
    loss_of(inputs).backward()
    wanted = model.lm_head.weight.grad
    model.zero_grad()
    held = HeldTensors(model, room, None)
    loss_of(inputs, held).backward()
    assert torch.equal(model.lm_head.weight.grad, wanted)
    # 2 layers of about 34 numbers a token and unit of width, 50 logits a token: a rough lower end.
    assert held.num_bytes > 4 * inputs["input_ids"].numel() * model.config.n_embd * 20
    with pytest.raises(ActivationsTooLarge):
        loss_of(inputs, HeldTensors(model, room, held.num_bytes - 1))
    loss_of(inputs, HeldTensors(model, room, held.num_bytes))


def test_a_warm_up_keeps_what_there_is_room_for() -> None:
    """And counts an address again once its tensor is gone."""
    memory = bytearray(64)
    held = HeldTensors(gpt2(), room=128, most=None)
    for number in (1, 2, 3):
        tensor = torch.frombuffer(memory, dtype=torch.float32)
        packed = held.keep(tensor)
        assert (packed is tensor) == (number < 3)
        held.keep(tensor[3:])
        assert held.num_bytes == 64 * number
        del tensor, packed


def test_the_report_says_which() -> None:
    for activations, wanted in (("auto", "keep"), ("keep", "keep"), ("recompute", "recompute")):
        report = TestTimeFinetuner(llama(), activations=activations).adapt_(texts(1), [1])
        assert report.activations == wanted


def test_refusals() -> None:
    with pytest.raises(ValueError, match="activations: expected"):
        TestTimeFinetuner(llama(), activations="drop")
    with pytest.raises(ValueError, match="expected 'auto' or 'keep' for compile=True"):
        TestTimeFinetuner(llama(), activations="recompute", compile=True)
