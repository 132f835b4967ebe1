# SPDX-License-Identifier: Apache-2.0
"""TestTimeFinetuner with any user between its queries and inside its blocks, in any order.

After every block, and after every call that fails, the model is what it was. In float64 a query
trains what the reference trains, whatever came before it.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import hullkit
import pytest
import torch
from _cases import machine
from _models import VOCABULARY, Before, distance, gpt2, llama, plain, same_bits, state, texts
from hullkit import reference
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor, nn

TEXTS = texts(3)
SETTINGS: list[tuple[str, Any]] = [
    *(("lr", value) for value in (0.0, 1e-3, 1e-2)),
    *(("refresh_interval", value) for value in (1, 2, 5)),
    *(("mode", value) for value in ("reuse", "accumulate")),
    *(("activations", value) for value in ("auto", "keep", "recompute")),
    *(("fuse", value) for value in (True, False)),
    *(("snapshot", value) for value in ("device", "host")),
    *(("rounding", value) for value in ("stochastic", "nearest")),
    *(("precision", value) for value in ("float32", "bf16")),
    ("betas", (0.0, 0.5)),
    ("seed", 7),
]
BAD: list[tuple[Any, Any]] = [
    ([TEXTS[0] + VOCABULARY], [1]),
    ([TEXTS[0]], [1, 1]),
    ([TEXTS[0]], [0]),
    ([TEXTS[0]], [-1]),
    ([TEXTS[0][:1]], [1]),
    ([TEXTS[0].to("meta")], [1]),
    ([TEXTS[0].double()], [1]),
    ([{"input_ids": TEXTS[0], "labels": TEXTS[1]}], [1]),
    ([{"labels": TEXTS[0]}], [1]),
    (TEXTS[0], [1]),
    ("text", [1]),
    ([], []),
]
counts = st.lists(st.integers(0, 4), min_size=3, max_size=3).filter(any)


class OwnError(Exception):
    pass


class Acts:
    """What a user may do to a model; inside of a block all of it is undone.

    copied: the parameters whose values a block puts back, if this is in one. Others, such as those
        that are thawed in it, are the user's to leave alone.
    """

    def __init__(
        self, model: nn.Module, place: int, copied: Sequence[nn.Parameter] | None = None
    ) -> None:
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.copied = {id(p) for p in (self.parameters if copied is None else copied)}
        self.chosen: Any = self.parameters[place % len(self.parameters)]
        owners = [
            m for m in model.modules() if any(p is self.chosen for p in m._parameters.values())
        ]
        self.owner = owners[place % len(owners)]
        [self.name, *_] = [n for n, p in self.owner._parameters.items() if p is self.chosen]

    def write(self) -> None:
        with torch.no_grad():
            self.chosen.mul_(0.875)

    def move(self) -> None:
        self.chosen.data = self.chosen.data.clone()

    def replace(self) -> None:
        """Unties a weight that was tied."""
        setattr(self.owner, self.name, nn.Parameter(self.chosen.detach() * 0.875))

    def freeze(self) -> None:
        if len(self.parameters) > 1:
            self.chosen.requires_grad_(False)

    def thaw(self) -> None:
        self.model.requires_grad_(True)

    def widen(self) -> None:
        self.model.double()

    def narrow(self) -> None:
        self.model.bfloat16()

    def flag(self) -> None:
        self.owner.train(not self.owner.training)

    def note(self) -> None:
        self.owner.register_buffer("noted", torch.ones(3))
        self.owner.notes = [*getattr(self.owner, "notes", []), torch.ones(2)]  # type: ignore[assignment]

    def extend(self) -> None:
        self.owner.more = nn.Linear(2, 2)

    def load(self) -> None:
        named = self.model.named_parameters(remove_duplicate=False)
        zeros = {name: torch.zeros_like(p) for name, p in named if id(p) in self.copied}
        self.model.load_state_dict(zeros, strict=False)


class InBlock(Acts):
    """And what makes sense in a block only."""

    def grad(self) -> None:
        self.chosen.grad = torch.ones_like(self.chosen)

    def train(self) -> None:
        self.model.train()
        self.model(TEXTS[0][None])

    def lose(self) -> None:
        delattr(self.owner, self.name)

    def free(self) -> None:
        self.chosen.untyped_storage().resize_(0)

    def copy(self) -> None:
        with pytest.raises(RuntimeError, match="not being adapted"):
            copy.deepcopy(hullkit.TestTimeFinetuner(self.model))

    def nest(self) -> None:
        other = hullkit.TestTimeFinetuner(self.model)
        for block in (other.adapted([TEXTS[2]], [1]), other.adapted([TEXTS[1]], [2])):
            with pytest.raises(RuntimeError, match="adapted"):
                block.__enter__()
        with pytest.raises(RuntimeError, match="adapted"):
            other.warmup([2])


def public(cls: type) -> list[str]:
    return sorted(name for name in dir(cls) if not name.startswith("_"))


class AnyAdaptations(RuleBasedStateMachine):
    @initialize(
        make=st.sampled_from([plain, llama, gpt2]),
        dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    )
    def begin(self, make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
        self.model = make().to(dtype)
        # Transformers takes the loss in float32, and Adam with a small eps makes as much of
        # gradients that are all rounding as of others: a text learnt by heart has such.
        self.bound, self.eps = (1e-9, 1e-8) if make is plain else (1e-6, 1e-3)
        self.tuner = self.fresh_tuner()
        self.before = Before(self.model)

    def fresh_tuner(self) -> hullkit.TestTimeFinetuner:
        return hullkit.TestTimeFinetuner(self.model, lr=1e-2, eps=self.eps)

    @invariant()
    def the_model_is_what_it_was(self) -> None:
        self.before.check()

    def expected(self, numbers: list[int]) -> dict[str, Tensor] | None:
        """The reference's weights, where it says to how many digits they must be met."""
        tuner, parameters = self.tuner, list(self.model.parameters())
        plain_passes = tuner.mode == "reuse" and tuner.precision == "float32"
        if not plain_passes or any(p.dtype is not torch.float64 for p in parameters):
            return None
        twin = copy.deepcopy(self.model)
        options = {"lr": tuner.lr, "refresh_interval": tuner.refresh_interval}
        reference.finetune(twin, TEXTS, numbers, betas=tuner.betas, eps=tuner.eps, **options)  # type: ignore[arg-type]
        return state(twin)

    @rule(
        numbers=counts,
        acts=st.lists(st.tuples(st.sampled_from(public(InBlock)), st.integers(0, 30)), max_size=6),
        leave=st.booleans(),
    )
    def query(self, numbers: list[int], acts: list[tuple[str, int]], leave: bool) -> None:
        wanted = self.expected(numbers)
        try:
            with self.tuner.adapted(TEXTS, numbers) as model:
                if wanted is not None:
                    assert distance(state(model), wanted) < self.bound
                assert all(p.grad is None for p in model.parameters())
                report = self.tuner.last_report
                assert report is not None
                assert report.num_updates == (sum(numbers) if self.tuner.mode == "reuse" else 1)
                self.act(model, acts)
                if leave:
                    raise OwnError
        except OwnError:
            assert leave
        if any(act == "free" for act, _ in acts):  # the values are back, in other memory
            self.before.check_bits()
            self.before = Before(self.model)

    def act(self, model: nn.Module, acts: list[tuple[str, int]]) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        for act, place in acts:
            done = InBlock(model, place, trained)
            if id(done.chosen) in done.copied:
                with suppress(AttributeError, RuntimeError, ValueError):  # of an earlier act
                    getattr(done, act)()
                if act == "free":  # whatever reads it now ends the process: torch does not look
                    return

    @rule(numbers=counts)
    def the_same_bits_twice(self, numbers: list[int]) -> None:
        found: list[list[Tensor]] = []
        for _ in range(2):
            with self.tuner.adapted(TEXTS, numbers) as model:
                found.append([p.detach().clone() for p in model.parameters()])
        assert all(same_bits(one, other) for one, other in zip(*found, strict=True))

    @rule(numbers=counts)
    def keep(self, numbers: list[int]) -> None:
        wanted = self.expected(numbers)
        self.tuner.adapt_(TEXTS, numbers)
        if wanted is not None:
            assert distance(state(self.model), wanted) < self.bound
        self.before = Before(self.model)

    @rule(query=st.sampled_from(BAD))
    def refused(self, query: tuple[Any, Any]) -> None:
        for call in (self.tuner.adapted, self.tuner.adapt_):
            with pytest.raises((TypeError, ValueError), match=r"examples|counts"):
                call(*query)

    @rule(numbers=counts, value=st.sampled_from([float("nan"), float("inf")]))
    def broken_weights(self, numbers: list[int], value: float) -> None:
        parameter = next(p for p in self.model.parameters() if p.requires_grad)
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.fill_(value)
        self.before = Before(self.model)
        with pytest.raises(FloatingPointError, match=r"examples\[\d\]"):
            self.tuner.adapt_(TEXTS, numbers)
        self.before.check()
        with torch.no_grad():
            parameter.copy_(kept)
        self.before = Before(self.model)

    @rule(setting=st.sampled_from(SETTINGS))
    def set(self, setting: tuple[str, Any]) -> None:
        setattr(self.tuner, *setting)

    @rule(act=st.sampled_from(public(Acts)), place=st.integers(0, 30))
    def change(self, act: str, place: int) -> None:
        getattr(Acts(self.model, place), act)()
        self.before = Before(self.model)

    @rule(how=st.sampled_from(["copy", "pickle", "another"]))
    def another_tuner(self, how: str) -> None:
        if how == "another":
            self.tuner = self.fresh_tuner()
            return
        made = copy.deepcopy if how == "copy" else lambda tuner: pickle.loads(pickle.dumps(tuner))
        self.tuner = made(self.tuner)
        self.model = self.tuner.model
        self.before = Before(self.model)

    @rule()
    def release(self) -> None:
        self.tuner.release()

    @rule()
    def warmup(self) -> None:
        self.tuner.warmup([2, 9])


AnyAdaptations.TestCase.settings = machine(30, 12)
TestAnyAdaptations = pytest.mark.usefixtures("one_thread")(AnyAdaptations.TestCase)


@pytest.mark.parametrize("size", [0, 40])
@pytest.mark.parametrize("name", ["embedding.weight", "head.weight", "norm.running_mean", "calls"])
def test_memory_taken_away_in_a_block(name: str, size: int) -> None:
    model = plain()
    before = Before(model)
    storage = dict(before.tensors())[name].untyped_storage()
    with hullkit.TestTimeFinetuner(model, lr=1e-2).adapted(TEXTS, [1, 0, 2]):
        storage.resize_(min(size, storage.nbytes() - 1))
    before.check_bits()
    for _, tensor in before.tensors():
        assert tensor.isfinite().all()  # and torch can read it


@pytest.mark.parametrize(
    "name", ["embedding.weight", "frozen.bias", "norm.running_mean", "repeated"]
)
def test_memory_taken_away_before_a_query(name: str) -> None:
    model = plain()
    tuner = hullkit.TestTimeFinetuner(model)
    storage = dict(Before(model).tensors())[name].untyped_storage()
    storage.resize_(storage.nbytes() - 1)
    for call in (lambda: tuner.adapt_(TEXTS, [1, 0, 2]), lambda: hullkit.TestTimeFinetuner(model)):
        with pytest.raises(ValueError, match=f"model: expected tensors with memory .*{name}"):
            call()
