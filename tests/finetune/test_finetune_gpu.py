# SPDX-License-Identifier: Apache-2.0
"""TestTimeFinetuner on a CUDA device: captured passes, and the way back from each phase."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from _gpu import count_recordings
from _models import (
    COUNTS,
    VOCABULARY,
    Before,
    FailingCall,
    PlainLM,
    distance,
    gpt2,
    injected,
    llama,
    plain,
    state,
    texts,
)
from hullkit.finetune import TestTimeFinetuner, base_weights, captured_passes, grouped_updates
from hullkit.finetune.settings import Settings
from torch import Tensor, nn

pytestmark = [pytest.mark.gpu, pytest.mark.plain_memory]


@pytest.fixture(autouse=True)
def no_fallback() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def adapted_state(tuner: TestTimeFinetuner, examples: Any, counts: Any) -> dict[str, Tensor]:
    with tuner.adapted(examples, counts) as model:
        return state(model)


@pytest.mark.parametrize("snapshot", ["device", "host"])
@pytest.mark.parametrize("build", [plain, llama, gpt2])
def test_captured_passes_equal_eager_ones(build: Callable[[], nn.Module], snapshot: str) -> None:
    model = build().cuda()
    before = Before(model)
    captured = TestTimeFinetuner(model, lr=1e-3, capture=True, snapshot=snapshot)
    eager = TestTimeFinetuner(model, lr=1e-3, capture=False, snapshot=snapshot)
    for counts in (COUNTS, [1, 3, 0, 9], COUNTS):
        ours = adapted_state(captured, texts(), counts)
        before.check()
        theirs = adapted_state(eager, texts(), counts)
        before.check()
        assert distance(ours, theirs) <= 1e-5
        assert all(torch.equal(ours[name], theirs[name]) for name in ours if name == "calls")
        report, other = captured.last_report, eager.last_report
        assert report is not None
        assert other is not None
        assert report.losses == pytest.approx(other.losses, rel=1e-5)
        assert (report.path, report.reason, other.path) == ("captured", None, "eager")
        assert report[:2] == other[:2]
        assert report.seconds.passes > 0
        assert report.seconds.restore is not None
        assert report.peak_memory > 0
    again = adapted_state(captured, texts(), COUNTS)
    assert all(torch.equal(again[name], ours[name]) for name in ours if name != "calls")


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_precisions_agree_roughly(precision: str) -> None:
    model = gpt2().cuda()
    exact = adapted_state(TestTimeFinetuner(model, lr=1e-3, capture=False), texts(), COUNTS)
    for capture in (True, False):
        tuner = TestTimeFinetuner(model, lr=1e-3, precision=precision, capture=capture)
        rough = adapted_state(tuner, texts(), COUNTS)
        assert 0.0 < distance(rough, exact) <= 0.02


def test_one_graph_for_each_length_and_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_passes, "MAX_GRAPHS", 2)
    model = llama().cuda()
    tuner = TestTimeFinetuner(model, capture=True)
    recorded = count_recordings(monkeypatch)
    tuner.warmup([5, 20])
    with tuner.adapted([torch.arange(7)], [3]):
        pass
    assert len(recorded) == 1
    assert tuner.recorded_lengths == (32,)
    examples = [torch.arange(n) % VOCABULARY for n in (40, 50, 60, 9)]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        ours = adapted_state(tuner, [examples[i] for i in order], [2, 1, 1, 1])
        eager = TestTimeFinetuner(model, capture=False)
        theirs = adapted_state(eager, [examples[i] for i in order], [2, 1, 1, 1])
        assert all(torch.allclose(ours[n], theirs[n], rtol=1e-4, atol=1e-5) for n in ours)
    assert len(tuner.recorded_lengths) <= 2


def test_a_changed_model_is_recorded_again() -> None:
    model = gpt2().cuda()
    tuner = TestTimeFinetuner(model, lr=1e-3, capture=True)
    adapted_state(tuner, texts(), COUNTS)
    first = tuner._passes.captured
    model.half().float()  # other addresses
    assert torch.isfinite(adapted_state(tuner, texts(), COUNTS)["transformer.wte.weight"]).all()
    assert tuner._passes.captured is not first
    second = tuner._passes.captured
    model.transformer.h[0].requires_grad_(False)
    base = state(model)
    changed = adapted_state(tuner, texts(), COUNTS)
    assert tuner._passes.captured is not second
    assert all(torch.equal(changed[n], base[n]) for n in base if ".h.0." in n)
    assert not torch.equal(changed["transformer.wte.weight"], base["transformer.wte.weight"])
    tuner.release()
    assert tuner._passes.captured is None
    tuner.lr = 0.0  # read at every query
    report = tuner.last_report
    tuner.warmup([17])
    assert tuner.last_report is report
    same = adapted_state(tuner, texts(), COUNTS)
    assert all(torch.equal(same[n], base[n]) for n in base)


OTHERS: dict[str, Any] = {
    "lr": 3e-2, "refresh_interval": 1, "mode": "accumulate", "betas": (0.5, 0.9), "eps": 1e-2,
    "precision": "bf16", "capture": False, "compile": False, "snapshot": "host",
    "rounding": "nearest", "seed": 5, "fuse": False, "activations": "recompute",
}  # fmt: skip
_ALIKE = ("precision", "compile", "snapshot", "capture", "fuse", "activations")


def test_all_settings_have_another_value() -> None:
    assert [*OTHERS] == [*Settings._fields]


@pytest.mark.parametrize("name", OTHERS)
def test_settings_hold_for_the_next_query(name: str) -> None:
    """Also where graphs were recorded with others."""
    model = llama().cuda().bfloat16()
    tuner = TestTimeFinetuner(model, lr=1e-2)
    former = adapted_state(tuner, texts(), COUNTS)
    setattr(tuner, name, OTHERS[name])
    found = adapted_state(tuner, texts(), COUNTS)
    made = TestTimeFinetuner(model, **{"lr": 1e-2, name: OTHERS[name]})
    wanted = adapted_state(made, texts(), COUNTS)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert tuner.last_report is not None
    assert made.last_report is not None
    assert tuner.last_report[:2] == made.last_report[:2]
    assert (tuner.last_report.path, tuner.last_report.reason) == (
        made.last_report.path, made.last_report.reason
    )  # fmt: skip
    alike = all(torch.equal(found[key], former[key]) for key in former)
    assert not alike or name in _ALIKE


def test_a_weight_transposed_in_place_is_recorded_again() -> None:
    model = plain().cuda()
    tuner = TestTimeFinetuner(model, lr=1e-3, capture=True)
    adapted_state(tuner, texts(), COUNTS)
    model.frozen.weight.data = model.frozen.weight.data.t()
    ours = adapted_state(tuner, texts(), COUNTS)
    theirs = adapted_state(TestTimeFinetuner(model, lr=1e-3, capture=False), texts(), COUNTS)
    assert distance(ours, theirs) <= 1e-5


def test_memory_that_the_block_freed() -> None:
    model = llama().cuda()
    before = Before(model)
    tuner = TestTimeFinetuner(model, lr=1e-3, capture=True)
    for _ in range(2):
        with tuner.adapted(texts(), COUNTS):
            freed = [weight.untyped_storage() for weight in model.parameters()]
            sizes = [storage.nbytes() for storage in freed]
            for storage in freed:
                storage.resize_(0)
            taken = [torch.zeros(n, dtype=torch.uint8, device="cuda") for n in sizes]
        assert not any(bool(tensor.any()) for tensor in taken)
        before.check_bits()


class Deciding(PlainLM):
    def forward(self, ids: Tensor) -> Tensor:
        out = super().forward(ids)
        return out * 2.0 if bool(out.sum() > 1e9) else out


class Replacing(PlainLM):
    def forward(self, ids: Tensor) -> Tensor:
        out = super().forward(ids)
        self.calls = self.calls + 1
        return out


def test_recorded_lengths_warm_another_tuner_up() -> None:
    model = llama().cuda()
    first = TestTimeFinetuner(model, lr=1e-3)
    assert first.recorded_lengths == ()
    examples = [torch.arange(n) % VOCABULARY for n in (40, 9, 17)]
    adapted_state(first, examples, [1, 1, 1])
    assert first.recorded_lengths == (32, 64)
    second = TestTimeFinetuner(model, lr=1e-3)
    second.warmup(first.recorded_lengths)
    assert second.recorded_lengths == (32, 64)
    second.release()
    assert second.recorded_lengths == ()


class Looking(PlainLM):
    """Every position sees all: a padded tail would change its loss."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embedding(ids).mean()


@pytest.mark.parametrize(
    ("build", "reason"), [(Deciding, "asks the device"), (Replacing, "buffer")]
)
def test_a_model_that_cannot_be_captured(build: type[PlainLM], reason: str) -> None:
    torch.manual_seed(0)
    model = build().cuda()
    before = Before(model)
    with pytest.raises(RuntimeError, match="expected a model that can be captured, got"):
        TestTimeFinetuner(model, capture=True).adapted(texts(), COUNTS).__enter__()
    before.check()
    tuner = TestTimeFinetuner(model, lr=1e-3)
    with pytest.warns(UserWarning, match="passes are not captured"):
        ours = adapted_state(tuner, texts(), COUNTS)
    before.check()
    assert tuner.last_report is not None
    assert tuner.last_report.path == "eager"
    assert reason in str(tuner.last_report.reason)
    theirs = adapted_state(TestTimeFinetuner(model, lr=1e-3, capture=False), texts(), COUNTS)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours if n != "calls")
    adapted_state(tuner, texts(), COUNTS)  # no second attempt, no second warning
    tuner.capture = True
    with pytest.raises(RuntimeError, match="expected a model that can be captured, got"):
        tuner.adapted(texts(), COUNTS).__enter__()
    before.check()


def test_padding_that_would_change_the_loss() -> None:
    torch.manual_seed(0)
    model = Looking().cuda()
    examples = [torch.arange(n) % VOCABULARY for n in (9, 17)]
    captured = adapted_state(TestTimeFinetuner(model, lr=1e-3, capture=True), examples, [2, 1])
    eager = adapted_state(TestTimeFinetuner(model, lr=1e-3, capture=False), examples, [2, 1])
    for name, tensor in captured.items():
        assert torch.allclose(tensor, eager[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (base_weights.Weights, "__init__"),
        (base_weights.Weights, "save"),
        (torch.cuda.CUDAGraph, "replay"),
        (grouped_updates.GroupedUpdates, "begin"),
        (grouped_updates.GroupedUpdates, "ready"),
        (grouped_updates.GroupedUpdates, "join"),
        (grouped_updates.GroupedUpdates, "set_gradients"),
        (grouped_updates.GroupedUpdates, "set_num_steps"),
        (PlainLM, "forward"),
        (torch.Tensor, "backward"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_failure_in_each_phase(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException], owner: type, name: str
) -> None:
    model = plain().cuda()
    before = Before(model)
    for failing in (1, 3):
        for warm in (False, True):
            tuner = TestTimeFinetuner(model, lr=1e-2, capture=True)
            if warm:
                tuner.warmup([20])
            call = FailingCall(owner, name, error, failing)
            with monkeypatch.context() as patch:
                patch.setattr(*call.place)
                failed = injected(tuner.adapted(texts(), COUNTS), error)
            assert failed is (call.calls >= failing)
            assert (tuner.last_report is None) is failed
            before.check()
            with tuner.adapted(texts(), COUNTS):  # and it works again
                pass
            before.check()


def test_in_place() -> None:
    model, other = llama().cuda(), llama().cuda()
    captured = TestTimeFinetuner(model, lr=1e-3, capture=True)
    eager = TestTimeFinetuner(other, lr=1e-3, capture=False)
    for counts in (COUNTS, [0, 2, 1, 0]):  # fresh moments for the second, from where the first left
        assert captured.adapt_(texts(), counts).path == "captured"
        eager.adapt_(texts(), counts)
        assert distance(state(model), state(other)) <= 1e-5
    before = Before(model)
    with captured.adapted(texts(), COUNTS):
        pass
    before.check()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(value: float) -> None:
    model = plain().cuda()
    model.head.weight = nn.Parameter(torch.randn(VOCABULARY, 12, device="cuda"))
    with torch.no_grad():
        model.embedding.weight[5] = value
    before = Before(model)
    tuner = TestTimeFinetuner(model, capture=True)
    good, bad = torch.tensor([1, 2, 3]), torch.tensor([1, 5, 3])
    with pytest.raises(FloatingPointError, match=r"loss of examples\[2\]: expected a finite"):
        tuner.adapted([good, bad, bad], [1, 0, 1]).__enter__()
    before.check()


def test_a_gradient_that_is_not_finite() -> None:
    model = plain().cuda()
    model.norm.bias.register_hook(lambda grad: grad * float("inf"))
    before = Before(model)
    tuner = TestTimeFinetuner(model, capture=True)
    with pytest.raises(FloatingPointError, match=r"gradient entry of examples\[1\]: expected a"):
        tuner.adapted(texts(), [0, 2, 2, 1]).__enter__()
    before.check()


def test_extra_inputs_bursts_of_any_length_and_streams() -> None:
    model = llama().cuda()
    ids = texts(1)[0]
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    captured = TestTimeFinetuner(model, lr=1e-3, capture=True, refresh_interval=100)
    eager = TestTimeFinetuner(model, lr=1e-3, capture=False, refresh_interval=100)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ours = adapted_state(captured, [ids, example], [1, 90])
    torch.cuda.current_stream().wait_stream(stream)
    theirs = adapted_state(eager, [ids, example], [1, 90])
    assert all(torch.allclose(ours[n], theirs[n], rtol=1e-3, atol=1e-5) for n in ours)


def test_mixed_dtypes_and_unused_parameters() -> None:
    model = llama().cuda()
    model.lm_head.bfloat16()
    model.unused = nn.Parameter(torch.ones(3, device="cuda"))
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].bfloat16(),))
    ours = adapted_state(
        TestTimeFinetuner(copy.deepcopy(model), lr=1e-3, capture=True), texts(), COUNTS
    )
    theirs = adapted_state(TestTimeFinetuner(model, lr=1e-3, capture=False), texts(), COUNTS)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-2, atol=1e-3)
    assert torch.equal(ours["unused"], torch.ones(3, device="cuda"))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_recomputed_layers_are_captured(build: Callable[[], nn.Module], precision: str) -> None:
    model = build().cuda()
    before = Before(model)
    results = []
    for activations in ("keep", "recompute"):
        tuner = TestTimeFinetuner(
            model, lr=1e-3, capture=True, precision=precision, activations=activations
        )
        results.append(adapted_state(tuner, texts(), COUNTS))
        before.check()
        assert tuner.last_report is not None
        assert tuner.last_report.path == "captured"
    # Recomputed layers are not fused, so they round otherwise.
    assert distance(*results) <= (1e-5 if precision == "float32" else 0.02)
