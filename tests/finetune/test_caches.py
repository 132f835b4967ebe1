# SPDX-License-Identifier: Apache-2.0
"""Passes keep no keys and values, also of models that take `use_cache` among other options."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from _models import Before, distance, gpt2, llama, state, texts
from hullkit.finetune import TestTimeFinetuner, adaptation
from hullkit.finetune.eager_passes import CheckpointError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread")


class HandsOn(nn.Module):
    """A wrapper that hands all options on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **options: Any) -> Any:
        return self.model(input_ids=input_ids, labels=labels, **options)


class Strict(HandsOn):
    """Another one, which refuses options that it does not know."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **options: Any) -> Any:
        assert not options
        return self.model(input_ids=input_ids, labels=labels)


def granite() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "shared_intermediate_size": 24}
    return GraniteMoeHybridForCausalLM(
        GraniteMoeHybridConfig(
            vocab_size=31,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=0,
            mamba_n_heads=4,
            mamba_d_head=8,
            layer_types=["attention", "attention"],
            pad_token_id=0,
            **sizes,
        )
    )


MODELS = [granite, lambda: HandsOn(llama()), lambda: Strict(gpt2())]


def configs(model: nn.Module) -> list[Any]:
    return list({id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values())


@pytest.mark.parametrize("build", MODELS, ids=["granite", "hands on", "strict"])
def test_layers_that_run_again(build: Any) -> None:
    found = []
    for activations in ("keep", "recompute"):
        model = build()
        before = Before(model)
        seen: set[bool] = set()
        model.register_forward_pre_hook(
            lambda model, _, seen=seen: seen.update(c.use_cache for c in configs(model))
        )
        tuner = TestTimeFinetuner(model, lr=1e-2, activations=activations)
        with tuner.adapted(texts(2), [2, 1]):
            assert all(config.use_cache for config in configs(model))  # the block may generate
            found.append(state(model))
        before.check()
        assert seen == {False}
    assert distance(*found) <= 1e-5


def test_an_error_turns_caches_on_again() -> None:
    model = HandsOn(llama())
    model.register_forward_hook(lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        TestTimeFinetuner(model).adapt_(texts(1), [1])
    assert all(config.use_cache for config in configs(model))


def test_what_the_user_has_turned_off_stays_off() -> None:
    model = HandsOn(llama())
    model.model.config.use_cache = False
    TestTimeFinetuner(model).adapt_(texts(1), [1])
    assert model.model.config.use_cache is False


def test_threads_whose_models_share_a_configuration() -> None:
    """The last pass of all turns the caches on again."""
    models = [HandsOn(llama()) for _ in range(2)]
    models[1].model.model.config = config = models[0].model.model.config
    both, first_is_done = threading.Barrier(2), threading.Event()
    seen: list[bool] = []

    def enter(model: nn.Module, inputs: Any) -> None:
        both.wait(20.0)

    def wait(model: nn.Module, inputs: Any) -> None:
        both.wait(20.0)
        assert first_is_done.wait(20.0)
        seen.append(config.use_cache)

    def adapt(model: nn.Module) -> None:
        TestTimeFinetuner(model).adapt_(texts(1), [1])

    for model, hook in zip(models, (enter, wait), strict=True):
        model.register_forward_pre_hook(hook)
    last = threading.Thread(target=adapt, args=(models[1],))
    last.start()
    adapt(models[0])
    first_is_done.set()
    last.join(20.0)
    assert seen == [False]
    assert config.use_cache is True


def test_an_error_that_a_signal_raises_turns_caches_on_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever it cuts short."""
    model = HandsOn(llama())
    put_back = adaptation.CachesOff.put_back
    calls = []

    def cut(caches: Any) -> None:
        calls.append(caches)
        if len(calls) < 3:
            raise TimeoutError
        put_back(caches)

    monkeypatch.setattr(adaptation.CachesOff, "put_back", cut)
    with pytest.raises(TimeoutError):
        TestTimeFinetuner(model).adapt_(texts(1), [1])
    assert model.model.config.use_cache is True


def test_a_checkpoint_that_fails_for_another_reason_says_so() -> None:
    class Moody(nn.Module):
        """Its second run keeps other tensors than its first."""

        def __init__(self) -> None:
            super().__init__()
            self.table, self.calls = nn.Embedding(31, 8), 0
            self.out = nn.Linear(8, 31)

        def part(self, x: Tensor) -> Tensor:
            self.calls += 1
            return (x.exp() * x.sin()).cos() if self.calls % 2 else x.exp()

        def forward(self, ids: Tensor) -> Any:
            return self.out(checkpoint(self.part, self.table(ids), use_reentrant=False))

    with pytest.raises(CheckpointError, match="different number of tensors"):
        TestTimeFinetuner(Moody()).adapt_(texts(1), [1])
