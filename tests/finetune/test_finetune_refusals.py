# SPDX-License-Identifier: Apache-2.0
"""TestTimeFinetuner: what it refuses."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _distributed import in_a_process_group
from _models import COUNTS, VOCABULARY, Before, gpt2, llama, plain, state, texts
from hullkit import PromptBatch, bits_per_byte
from hullkit.finetune import TestTimeFinetuner
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")


def test_one_adaptation_at_a_time() -> None:
    model = llama()
    before = Before(model)
    tuner = TestTimeFinetuner(model)
    shared = [tuner, TestTimeFinetuner(model), TestTimeFinetuner(nn.Sequential(model))]
    shared.append(TestTimeFinetuner(model.model))
    block = tuner.adapted(texts(), COUNTS)
    with block:
        inside = state(model)
        for other in shared:
            with pytest.raises(RuntimeError, match="model that is not being adapted, got one"):
                other.adapted(texts(), COUNTS).__enter__()
        with pytest.raises(RuntimeError, match="a with-block of its own for each call"):
            block.__enter__()
        assert all(torch.equal(inside[k], v) for k, v in model.state_dict().items())
        with TestTimeFinetuner(plain()).adapted(texts(), COUNTS):  # another model is fine
            pass
    before.check()
    with tuner.adapted(texts(), COUNTS):
        pass


@pytest.mark.parametrize("share", [lambda weight: weight, lambda weight: nn.Parameter(weight.data)])
def test_weights_that_other_modules_share(share: Callable[[Tensor], nn.Parameter]) -> None:
    """By one parameter, or by two of one memory. What the other one only reads may be shared."""
    one, other = llama(), llama()
    other.model.embed_tokens.weight = share(one.model.embed_tokens.weight)
    before = Before(one)
    tuner = TestTimeFinetuner(other)
    with (
        TestTimeFinetuner(one).adapted(texts(), COUNTS),
        pytest.raises(RuntimeError, match="shares some with a model inside an adapted"),
    ):
        tuner.adapted(texts(), COUNTS).__enter__()
    before.check()
    with tuner.adapted(texts(), COUNTS):
        pass
    before.check()
    other.model.embed_tokens.weight = nn.Parameter(one.lm_head.weight.data, requires_grad=False)
    with TestTimeFinetuner(one).adapted(texts(), COUNTS), tuner.adapted(texts(), COUNTS):
        pass
    before.check()


def test_weights_of_one_memory_that_do_not_overlap() -> None:
    """Models of one flat storage, and one at the place of another whose block nobody left."""
    flat = torch.randn(2, 8, 8)
    models = []
    for part in flat:
        model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8, bias=False))
        model[1].weight.data = part
        models.append(model)
    text = torch.tensor([1, 2, 3])
    one, other = (TestTimeFinetuner(model) for model in models)
    with one.adapted([text], [1]), other.adapted([text], [1]):
        pass
    block = one.adapted([text], [1])
    block.__enter__()
    del block, one, model, models
    gc.collect()
    again, shares = (nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8, bias=False)) for _ in "ab")
    again[1].weight.data = shares[1].weight.data = flat[0]
    with (
        TestTimeFinetuner(again).adapted([text], [1]),
        pytest.raises(RuntimeError, match="shares some with a model inside an adapted"),
    ):
        TestTimeFinetuner(shares).adapted([text], [1]).__enter__()


@pytest.mark.parametrize("build", [plain, llama])
def test_loss_that_is_not_finite(build: Callable[[], nn.Module]) -> None:
    model = build()
    with torch.no_grad():
        next(model.parameters())[5] = math.nan
    before = Before(model)
    good, bad = torch.tensor([1, 2, 3]), torch.tensor([1, 5, 3])
    if build is plain:
        model.head.weight = nn.Parameter(torch.randn(VOCABULARY, 12))
        before = Before(model)
    with pytest.raises(FloatingPointError, match=r"loss of examples\[2\]: .* finite .*, got nan"):
        TestTimeFinetuner(model).adapted([good, bad, bad], [1, 0, 1]).__enter__()
    before.check()


@pytest.mark.parametrize("mode", ["reuse", "accumulate"])
def test_a_loss_that_depends_on_nothing_trained(mode: str) -> None:
    """Of one example: the model's other branch is frozen."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.long = nn.Embedding(VOCABULARY, VOCABULARY)
            self.short = nn.Embedding(VOCABULARY, VOCABULARY).requires_grad_(False)

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = (self.long if ids.shape[1] > 5 else self.short)(ids)
            return logits

    model = Branches()
    before = Before(model)
    block = TestTimeFinetuner(model, mode=mode).adapted(texts(3), [1, 1, 1])
    words = r"examples\[2\]: expected a loss that depends on a parameter with requires_grad"
    with pytest.raises(ValueError, match=words):
        block.__enter__()
    before.check()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradient_that_is_not_finite(value: float) -> None:
    model = plain()
    before = Before(model)
    calls = 0

    def spoil(grad: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        grad = grad.clone()
        grad[3] = value if calls == 3 else grad[3]
        return grad

    model.norm.bias.register_hook(spoil)
    with pytest.raises(
        FloatingPointError, match=r"gradient entry of examples\[2\]: .* got (nan|inf)"
    ):
        TestTimeFinetuner(model).adapted(texts(3), [4, 0, 2]).__enter__()
    before.check()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, "model: expected a torch.nn.Module, got int"),
        ({"model": plain().requires_grad_(False)}, ValueError, "model: .*requires_grad, got none"),
        ({"lr": -1.0}, ValueError, "lr: expected a number >= 0.0, got -1"),
        ({"lr": math.nan}, ValueError, "lr: expected a number >= 0.0, got nan"),
        ({"lr": math.inf}, ValueError, "lr: expected a number below inf, got inf"),
        ({"lr": "1"}, TypeError, "lr: expected a number, got str"),
        ({"refresh_interval": 0}, ValueError, "refresh_interval: expected an int >= 1, got 0"),
        ({"refresh_interval": 1.5}, TypeError, "refresh_interval: expected an int, got float"),
        ({"betas": 0.9}, TypeError, "betas: expected a pair of numbers, got 0.9"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\]: expected a number below 1.0, got 1.0"),
        ({"eps": -1e-8}, ValueError, "eps: expected a number >= 0.0, got -1e-08"),
        ({"precision": "fp8"}, ValueError, "precision: expected one of 'float32', .*, got 'fp8'"),
        ({"capture": "yes"}, ValueError, "capture: expected one of None, True, False, got 'yes'"),
        ({"compile": 3}, ValueError, "compile: expected one of True, False, got 3"),
        (
            {"snapshot": "disk"},
            ValueError,
            "snapshot: expected one of 'device', .*got 'disk'",
        ),
        (
            {"mode": "accumulate", "capture": True},
            ValueError,
            "capture: expected None or False for mode='accumulate', got True",
        ),
        ({"weight_decay": 0.1}, TypeError, "unexpected keyword argument 'weight_decay'"),
    ],
)
def test_bad_construction(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TestTimeFinetuner(**{"model": plain(), **arguments})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lr": "x"}, TypeError, "lr: expected a number, got str"),
        ({"refresh_interval": 0}, ValueError, "refresh_interval: expected an int >= 1, got 0"),
        ({"mode": "reus"}, ValueError, "mode: expected one of 'reuse', 'accumulate', got 'reus'"),
        ({"rounding": "nearst"}, ValueError, "rounding: expected one of .*, got 'nearst'"),
        ({"betas": [0.9]}, TypeError, r"betas: expected a pair of numbers, got \[0.9\]"),
        ({"seed": -1}, ValueError, r"seed: expected an int in 0\.\..*, got -1"),
        (
            {"compile": True, "activations": "recompute"},
            ValueError,
            "activations: expected 'auto' or 'keep' for compile=True, got 'recompute'",
        ),
    ],
)
def test_bad_attribute(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    """The next query refuses what was set, by its call."""
    model = plain()
    before = Before(model)
    tuner = TestTimeFinetuner(model)
    former = {name: getattr(tuner, name) for name in settings}
    for name, value in settings.items():
        setattr(tuner, name, value)
    for call in (lambda: tuner.adapted(texts(), COUNTS), lambda: tuner.warmup([3])):
        with pytest.raises(error, match=message):
            call()
    before.check()
    for name, value in former.items():
        setattr(tuner, name, value)
    with tuner.adapted(texts(), COUNTS):
        pass
    before.check()


def test_another_model_needs_another_tuner() -> None:
    model = plain()
    tuner = TestTimeFinetuner(model)
    with pytest.raises(AttributeError, match="model"):
        tuner.model = plain()  # type: ignore[misc]
    assert tuner.model is model


IDS = torch.tensor([1, 2, 3])


@pytest.mark.parametrize(
    ("example", "error", "message"),
    [
        ([1, 2], TypeError, r"examples\[1\]: expected a torch.Tensor, got list"),
        (IDS.int(), TypeError, r"examples\[1\]: expected dtype torch.int64, got torch.int32"),
        (IDS[:1], ValueError, r"examples\[1\]: expected at least 2 tokens, got 1"),
        (IDS.expand(2, 3), ValueError, r"examples\[1\]: expected shape .*, got \(2, 3\)"),
        (IDS + 29, ValueError, r"examples\[1\]: expected ids in \[0, 31\), got 32"),
        (IDS - 2, ValueError, r"examples\[1\]: expected ids in \[0, 31\), got -1"),
        ({"labels": IDS}, ValueError, r"examples\[1\]: expected the key 'input_ids', got"),
        ({"input_ids": IDS, "x": 1}, (TypeError, ValueError), r"examples\[1\].*'x'"),
        ({"input_ids": IDS, "labels": [1]}, TypeError, r"\['labels'\]: expected a torch.Tensor"),
        ({"input_ids": IDS, "labels": IDS[:2]}, ValueError, r"\['labels'\]: .*\(1, 3\), got"),
        ({"input_ids": IDS, "labels": IDS.float()}, TypeError, r"\['labels'\]: .*torch.float32"),
        ({"input_ids": IDS, "labels": IDS + 40}, ValueError, r"\['labels'\]: expected ids in"),
        ({"input_ids": IDS, "labels": IDS * 0 - 100}, ValueError, "expected a scored token"),
    ],
)
@pytest.mark.parametrize("build", [plain, llama])
def test_bad_example(
    build: Callable[[], nn.Module],
    example: Any,
    error: type[Exception],
    message: str,
) -> None:
    model = build()
    before = Before(model)
    with pytest.raises(error, match=message):  # by the call, before entry, skipped or not
        TestTimeFinetuner(model).adapted([IDS, example], [1, 0])
    before.check()


@pytest.mark.parametrize(
    ("examples", "counts", "error", "message"),
    [
        ([IDS], [1, 1], ValueError, "examples: expected 2, as counts, got 1"),
        (IDS, [1, 1, 1], TypeError, "examples: expected a list of examples, got Tensor"),
        ({"input_ids": IDS}, [1], TypeError, "examples: expected a list of examples, got dict"),
        ([IDS], [0], ValueError, "counts: expected a total of at least 1"),
        ([IDS], [1.0], TypeError, "counts: expected integers, got float"),
    ],
)
def test_bad_multiset(examples: Any, counts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TestTimeFinetuner(plain()).adapted(examples, counts)


def test_two_parameters_over_one_memory() -> None:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False))
    tuner = TestTimeFinetuner(model)
    model[1].weight = nn.Parameter(model[0].weight.data)
    for call in (lambda: tuner.adapted(texts(), COUNTS), lambda: tuner.warmup([3])):
        with pytest.raises(ValueError, match=r"two that do: '0.weight' and '1.weight'; tie them"):
            call()


def test_longer_than_a_learned_table_of_positions() -> None:
    """On a GPU the index would end the process. Computed positions have no such end."""
    ids = torch.zeros(65, dtype=torch.int64)
    tuner = TestTimeFinetuner(gpt2())
    for refused in (
        lambda: tuner.adapted([ids], [1]),
        lambda: tuner.warmup([65]),
        lambda: bits_per_byte(gpt2(), ids, 64),
    ):
        with pytest.raises(ValueError, match="expected at most 64 tokens, the model's positions"):
            refused()
    tuner.warmup([64])
    with tuner.adapted([ids[:64]], [1]):
        pass
    with TestTimeFinetuner(llama()).adapted([ids], [1]):
        pass


def test_tf32_and_capture_need_a_cuda_device() -> None:
    model = plain()
    before = Before(model)
    for options in ({"precision": "tf32"}, {"capture": True}):
        tuner = TestTimeFinetuner(model, **options)
        with pytest.raises(ValueError, match="expected a CUDA device"):
            tuner.adapted(texts(), COUNTS).__enter__()
        before.check()
    with pytest.raises(ValueError, match="select_seconds: expected a number >= 0"):
        TestTimeFinetuner(model).adapted(texts(), COUNTS, select_seconds=-1.0)


def test_frozen_after_construction() -> None:
    model = plain()
    tuner = TestTimeFinetuner(model)
    model.requires_grad_(False)
    before = Before(model)
    with pytest.raises(ValueError, match="model: expected a parameter with requires_grad"):
        tuner.adapted(texts(), COUNTS).__enter__()
    before.check()


def test_a_sparse_buffer() -> None:
    model = plain()
    model.register_buffer("mask", torch.eye(3).to_sparse())
    with pytest.raises(
        ValueError, match=r"expected strided tensors, got torch\.sparse_coo: 'mask'"
    ):
        TestTimeFinetuner(model)


def test_an_expanded_parameter_is_named() -> None:
    model = plain()
    model.wide = nn.Parameter(torch.ones(1).expand(4))
    with (
        pytest.raises(ValueError, match="expected elements side by side"),
        TestTimeFinetuner(model).adapted(texts(), COUNTS),
    ):
        pass


def test_two_parameters_over_one_memory_are_named() -> None:
    model = plain()
    model.extra = nn.Linear(12, 31, bias=False)
    model.extra.weight = nn.Parameter(model.embedding.weight.data)
    before = Before(model)
    tuner = TestTimeFinetuner(model)
    with pytest.raises(ValueError, match=r"model: .*'embedding.weight' and 'extra.weight'"):
        tuner.adapted([IDS], [1])  # by the call, before entry
    before.check()
    model.extra.weight.requires_grad_(False)  # it is read only
    with tuner.adapted([IDS], [1]):
        pass


def test_ranks_that_share_gradients(tmp_path: Path) -> None:
    def check() -> None:
        shared = nn.parallel.DistributedDataParallel(llama())
        for model in (shared, nn.Sequential(shared)):
            for made in (TestTimeFinetuner, PromptBatch):
                with pytest.raises(TypeError, match=r"model: .*DistributedDataParallel.*\.module"):
                    made(model)
        TestTimeFinetuner(shared.module)

    in_a_process_group(tmp_path, check)
