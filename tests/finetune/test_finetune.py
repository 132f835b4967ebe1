# SPDX-License-Identifier: Apache-2.0
"""TestTimeFinetuner: the procedure against its oracle."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _models import COUNTS, MODELS, VOCABULARY, Before, distance, llama, plain, state, texts
from hullkit.finetune import TestTimeFinetuner
from hullkit.optim import Adam
from hullkit.reference.finetune import finetune as oracle
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("refresh_interval", [1, 2, 3, 9])
def test_is_the_oracle(build: Callable[[], nn.Module], refresh_interval: int) -> None:
    model = build().double()
    naive = copy.deepcopy(model)
    options: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6}
    options["refresh_interval"] = refresh_interval
    # Hugging Face models compute their loss in float32 whatever the model's dtype.
    exact = build is plain
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if exact else {"rtol": 1e-4, "atol": 1e-6}
    losses = oracle(naive, texts(), COUNTS, **options)
    before = Before(model)
    tuner = TestTimeFinetuner(model, **options)
    with tuner.adapted(texts(), torch.tensor(COUNTS)) as adapted:
        assert adapted is model
        assert all(p.grad is None for p in model.parameters())
        assert not any(module.training for module in model.modules())
        for p, expected, base in zip(
            model.parameters(), naive.parameters(), build().double().parameters(), strict=True
        ):
            torch.testing.assert_close(p, expected, **tolerance)
            assert p.requires_grad is not torch.equal(p, base)
    before.check()
    report = tuner.last_report
    assert report is not None
    assert report.losses == pytest.approx(losses, rel=1e-12 if exact else 1e-6)
    assert report.num_updates == sum(COUNTS)
    assert report.num_passes == len(losses) == sum(-(-c // refresh_interval) for c in COUNTS)


@pytest.mark.parametrize("build", MODELS)
def test_defaults_lower_the_loss_and_queries_are_independent(
    build: Callable[[], nn.Module],
) -> None:
    tuner = TestTimeFinetuner(build())
    assert (tuner.lr, tuner.refresh_interval) == (5e-5, 2)
    assert (tuner.betas, tuner.eps) == ((0.9, 0.999), 1e-8)
    with tuner.adapted(texts(), [9, 0, 4, 1], select_seconds=0.5) as model:
        first = state(model)
    report = tuner.last_report
    assert report is not None
    assert report.seconds.select == 0.5
    assert list(report.losses[:5]) == sorted(report.losses[:5], reverse=True)
    with tuner.adapted(texts(2), [1, 1]):
        pass
    with tuner.adapted(texts(), [9, 0, 4, 1]) as model:  # fresh moments: the same bits again
        again = state(model)
    assert all(torch.equal(first[k], again[k]) for k in first if k != "calls")


@pytest.mark.parametrize("build", MODELS)
def test_forms_of_an_example_agree(build: Callable[[], nn.Module]) -> None:
    ids = texts(1)[0]
    forms: list[Any] = [ids, ids[None], {"input_ids": ids}, {"input_ids": ids, "labels": ids[None]}]
    if build is not plain:
        forms.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    results = []
    for form in forms:
        with TestTimeFinetuner(build(), lr=1e-3).adapted([form], [3]) as model:
            results.append(state(model))
    for result in results[1:]:
        assert all(torch.equal(result[name], results[0][name]) for name in result)


@pytest.mark.parametrize("build", [plain, llama])
def test_labels_that_are_not_scored(build: Callable[[], nn.Module]) -> None:
    ids = texts(1)[0]
    labels = ids.clone()
    labels[6:] = -100  # causal: what follows the last scored token has no influence
    tuner = TestTimeFinetuner(build())
    with tuner.adapted([{"input_ids": ids, "labels": labels}], [1]):
        masked = tuner.last_report
    with tuner.adapted([ids[:6]], [1]):
        cut = tuner.last_report
    assert masked is not None
    assert cut is not None
    assert masked.losses == pytest.approx(cut.losses, rel=1e-5)


def test_masked_tokens_are_not_scored() -> None:
    """Where the labels are left out, as tokenizers do with padding."""
    ids = texts(1)[0]
    mask = torch.ones_like(ids)
    mask[:5] = 0
    tuner, losses = TestTimeFinetuner(llama()), []
    for labels in ({}, {"labels": ids.where(mask == 1, -100)}, {"labels": ids}):
        with tuner.adapted([{"input_ids": ids, "attention_mask": mask} | labels], [1]):
            assert tuner.last_report is not None
            losses.append(tuner.last_report.losses)
    assert losses[0] == losses[1] != losses[2]
    with pytest.raises(ValueError, match=r"examples\[0\]\['attention_mask'\]: .*\(1, 17\), got"):
        tuner.adapted([{"input_ids": ids, "attention_mask": mask[1:]}], [1])
    every = torch.full((1, 1, 17, 17), -1e9).triu(1)  # one that names no tokens
    plain_one = tuner.adapt_([ids], [1]).losses
    tuner.model.load_state_dict(llama().state_dict())
    found = tuner.adapt_([{"input_ids": ids, "attention_mask": every}], [1]).losses
    assert found == pytest.approx(plain_one, rel=1e-5)


def test_only_what_requires_grad_is_trained() -> None:
    model = llama().requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(True)
    base, before = state(model), Before(model)
    with TestTimeFinetuner(model, lr=1e-2).adapted(texts(), COUNTS):
        changed = {n for n, t in model.state_dict().items() if not torch.equal(t, base[n])}
    assert changed == {n for n, p in model.named_parameters() if "layers.1.mlp" in n}
    before.check()


def test_works_under_no_grad_and_inference_mode() -> None:
    for mode in (torch.no_grad(), torch.inference_mode()):
        model = plain()
        before = Before(model)
        with mode, TestTimeFinetuner(model, lr=1e-2).adapted(texts(), COUNTS):
            assert not torch.is_grad_enabled()
            assert not torch.equal(model.head.weight, before.bits["head.weight"][2])
        before.check()


def test_moments_are_freed_before_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []
    original = Adam.step_with

    def step_with(self: Adam, grads: dict[Any, Any], **options: Any) -> None:
        original(self, grads, **options)
        alive.extend(weakref.ref(s["exp_avg"]) for s in self.state.values())
        alive.extend(map(weakref.ref, grads.values()))

    monkeypatch.setattr(Adam, "step_with", step_with)
    model = plain()
    gc.disable()
    try:
        with TestTimeFinetuner(model).adapted(texts(), COUNTS):
            assert len(alive) > 0
            gc.collect()
            assert all(ref() is None for ref in alive)
    finally:
        gc.enable()


def test_moments_are_freed_while_the_error_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []
    original = Adam.step_with

    def step_with(self: Adam, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        alive.extend(weakref.ref(s["exp_avg"]) for s in self.state.values())
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(Adam, "step_with", step_with)
    with pytest.raises(torch.OutOfMemoryError) as held:
        TestTimeFinetuner(plain()).adapted(texts(), COUNTS).__enter__()
    assert held.traceback
    assert len(alive) > 0
    assert all(ref() is None for ref in alive)


@pytest.mark.parametrize("build", MODELS)
def test_in_place(build: Callable[[], nn.Module]) -> None:
    """The same weights as in the block, and everything else as before."""
    model, other = build(), build()
    tuner = TestTimeFinetuner(model, lr=1e-3)
    with tuner.adapted(texts(), COUNTS):
        wanted = state(model)
    before = Before(model)
    report = tuner.adapt_(texts(), COUNTS)
    assert (report.num_updates, report.num_passes) == (8, 5)
    assert all(torch.equal(wanted[name], tensor) for name, tensor in model.state_dict().items())
    assert before.look() == before.facts
    TestTimeFinetuner(other, lr=1e-3).adapt_(texts(), COUNTS)
    with TestTimeFinetuner(other, lr=1e-3).adapted(texts(), [0, 2, 1, 0]):
        wanted = state(other)
    with tuner.adapted(texts(), [0, 2, 1, 0]):  # from there, with fresh moments
        assert all(torch.equal(wanted[name], tensor) for name, tensor in state(model).items())


def test_the_report_of_another_query_is_left_alone() -> None:
    """Another thread may finish one while the first is restored."""
    tuner = TestTimeFinetuner(plain())
    with tuner.adapted(texts(), COUNTS):
        assert tuner.last_report is not None
        other = tuner.last_report = tuner.last_report._replace(num_passes=99)
    assert tuner.last_report is other
    assert tuner.last_report.seconds.restore is None


def test_in_place_is_undone_if_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain()
    before = Before(model)
    original, calls = Adam.step_with, 0

    def step_with(self: Adam, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("injected")
        return original(self, *arguments, **options)

    monkeypatch.setattr(Adam, "step_with", step_with)
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        TestTimeFinetuner(model, lr=1e-2).adapt_(texts(), COUNTS)
    before.check()


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16"},
        {"fuse": False},
        {"activations": "recompute"},
        {"snapshot": "host", "refresh_interval": 1, "lr": 1e-3},
        {"mode": "accumulate", "betas": [0.5, 0.9], "eps": 1e-3},
        {"rounding": "nearest"},
        {"seed": 5},
    ],
)
@pytest.mark.usefixtures("replaced_on_a_cpu")
def test_attributes_are_followed_when_they_are_set(settings: dict[str, Any]) -> None:
    """The same as a tuner that was made with them, and the former behaviour when set back."""
    models = [llama().to(torch.bfloat16 if {*settings} & {"rounding", "seed"} else torch.float32)]
    models += [copy.deepcopy(models[0]) for _ in range(2)]
    tuner = TestTimeFinetuner(models[0], lr=1e-2)
    former = {name: getattr(tuner, name) for name in settings}
    for name, value in settings.items():
        setattr(tuner, name, value)
    made = TestTimeFinetuner(models[1], **{"lr": 1e-2, **settings})
    plain_one = TestTimeFinetuner(models[2], lr=1e-2)
    found, wanted, other = [], [], []
    for each, into in ((tuner, found), (made, wanted), (plain_one, other)):
        with each.adapted(texts(), COUNTS) as adapted:
            assert each.last_report is not None
            into += [state(adapted), each.last_report.fused, each.last_report.activations]
    assert all(torch.equal(found[0][name], wanted[0][name]) for name in wanted[0])
    assert found[1:] == wanted[1:]
    if {*settings} & {"fuse", "activations"}:
        assert found[1:] != other[1:]
    else:
        assert not all(torch.equal(found[0][name], other[0][name]) for name in other[0])
    for name, value in former.items():
        setattr(tuner, name, value)
    with tuner.adapted(texts(), COUNTS) as adapted:
        assert all(torch.equal(t, other[0][name]) for name, t in state(adapted).items())


class Routed(nn.Module):
    """Each text goes through one of two experts; the other one gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        out: Tensor = self.head(x + torch.tanh(self.experts[int(ids[0, 0] % 2)](x)))
        return out


def test_weights_without_a_gradient_stay() -> None:
    """As torch.optim leaves them: no momentum moves them, and their steps are not counted."""
    examples = [torch.tensor([first, 5, 6, 7]) for first in (0, 1, 2)]
    counts, models = [2, 3, 2], [Routed().double() for _ in range(3)]
    TestTimeFinetuner(models[0], lr=0.01).adapt_(examples, counts)
    oracle(models[1], examples, counts, lr=0.01)
    optimizer = torch.optim.Adam(models[2].parameters(), lr=0.01)
    for ids, count in zip(examples, counts, strict=True):
        for update in range(count):
            if update % 2 == 0:
                optimizer.zero_grad()
                logits = models[2](ids[None])[0, :-1]
                nn.functional.cross_entropy(logits, ids[1:]).backward()
            optimizer.step()
    for model in models[:2]:
        assert distance(model.state_dict(), models[2].state_dict()) < 1e-12


def drop_gradients(model: nn.Module, passes: set[int]) -> None:
    """In these passes, counted from 1, hooks take all gradients, as an update in backward does."""
    made: list[Any] = []
    model.register_forward_pre_hook(lambda *_: made.append(None))

    def drop(parameter: Tensor) -> None:
        if len(made) in passes:
            parameter.grad = None

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(drop)


@pytest.mark.parametrize(("passes", "updates"), [({1, 2, 3, 4, 5}, 0), ({2}, 6), ({1, 4}, 4)])
def test_passes_without_gradients_are_no_updates(passes: set[int], updates: int) -> None:
    """Neither weights nor moments nor Adam's counts move, as in torch.optim."""
    model = plain().double().eval()
    naive = copy.deepcopy(model)
    for one in (model, naive):
        drop_gradients(one, passes)
    report = TestTimeFinetuner(model, lr=1e-2).adapt_(texts(), COUNTS)
    assert (report.num_updates, report.num_passes) == (updates, 5)
    optimizer = torch.optim.Adam([p for p in naive.parameters() if p.requires_grad], lr=1e-2)
    for ids, count in zip(texts(), COUNTS, strict=True):
        for update in range(count):
            if update % 2 == 0:
                optimizer.zero_grad()
                nn.functional.cross_entropy(naive(ids[None])[0, :-1], ids[1:]).backward()
            optimizer.step()
    for ours, theirs in zip(model.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
