# SPDX-License-Identifier: Apache-2.0
"""Integer inputs that look up rows of a table: an index outside it is an error with a name."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any

import hullkit
import pytest
import torch
import torch.nn.functional as F
from _models import VOCABULARY, gpt2
from _prompts import DEVICE, batch_of, text
from _signals import AtEvery, raising
from hullkit import TestTimeFinetuner
from hullkit.language_model import lookups, pass_modes
from hullkit.prompt_batch import Generate
from torch import Tensor, nn

pytestmark = [pytest.mark.usefixtures("one_thread")]
if DEVICE.type == "cuda":
    pytestmark += [pytest.mark.gpu]

IDS = text(12, 0)
PLACES = torch.arange(12)
ROWS = 40

Lookup = Callable[[Tensor, Tensor], Tensor]


class WithKinds(nn.Module):
    """Its forward adds rows of a plain parameter, by a lookup of any kind, and counts."""

    calls: Tensor

    def __init__(self, lookup: Lookup = lambda table, kinds: table[kinds]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 12)
        self.table = nn.Parameter(torch.randn(ROWS, 12))
        self.head = nn.Linear(12, VOCABULARY)
        self.lookup = lookup
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, ids: Tensor, kinds: Any = None, attention_mask: Any = None) -> Tensor:
        self.calls += 1
        x = self.embedding(ids)
        if kinds is not None:
            x = x + self.lookup(self.table, kinds)
        out: Tensor = self.head(F.dropout(x, 0.1).cumsum(1))
        return out


def adapt(model: nn.Module, tuner: TestTimeFinetuner, **inputs: Tensor) -> Any:
    return tuner.adapt_([IDS, {"input_ids": IDS} | inputs], [1, 1])


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("position_ids", PLACES + 60, r"indices in \[0, 64\), the rows of a table, got 71"),
        ("position_ids", -PLACES, r"indices in \[0, 64\), the rows of a table, got -11"),
        ("token_type_ids", PLACES + 25, rf"indices in \[0, {VOCABULARY}\), .* got 36"),
    ],
)
def test_inputs_of_gpt2(name: str, value: Tensor, words: str) -> None:
    model = gpt2().to(DEVICE)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tuner = TestTimeFinetuner(model)
    with pytest.raises(ValueError, match=rf"examples\[1\]\['{name}'\]: expected {words}"):
        adapt(model, tuner, **{name: value})
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())
    adapt(model, tuner, **{name: PLACES})
    batch = batch_of(model, 1)
    query = hullkit.Query([IDS], [1], Generate(IDS, max_new_tokens=2, **{name: value[None]}))
    inputs = {name: value[None].to(DEVICE)}
    calls: list[Callable[[], Any]] = [
        lambda: batch(IDS[None].to(DEVICE), **inputs),
        lambda: batch.generate(IDS[None].to(DEVICE), max_new_tokens=2, **inputs),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"^{name}: expected {words}"):
            call()
    if DEVICE.type == "cpu":  # elsewhere the query's inputs lie on another device
        [answer] = batch.map([query])
        assert str(answer.error).startswith(f"{name}: expected indices")


@pytest.mark.parametrize(
    "lookup",
    [
        lambda table, kinds: table[kinds + 2],
        lambda table, kinds: table.T[:, kinds + 2].permute(1, 2, 0),
        lambda table, kinds: (
            table.T.unflatten(0, (4, 3))[..., kinds + 2].permute(2, 3, 0, 1).flatten(2)
        ),
        lambda table, kinds: F.embedding(kinds + 2, table),
        lambda table, kinds: table.index_select(0, kinds[0] + 2)[None],
        lambda table, kinds: table.gather(0, (kinds[0] + 2)[:, None].expand(-1, 12))[None],
    ],
)
def test_what_a_forward_adds_to_an_index_counts(lookup: Lookup) -> None:
    model = WithKinds(lookup).to(DEVICE)
    tuner = TestTimeFinetuner(model, capture=False)
    adapt(model, tuner, kinds=PLACES + 26)
    with pytest.raises(ValueError, match=rf"\['kinds'\]: .*{ROWS}\), the rows of a table, got 40"):
        adapt(model, tuner, kinds=PLACES + 27)


def test_a_trial_runs_once_for_new_values_and_leaves_no_trace() -> None:
    runs: list[int] = []
    states: list[Any] = []
    for given in ({}, {"kinds": PLACES}, {"kinds": PLACES.flip(0)}, {"kinds": PLACES + 1},
                  {"attention_mask": torch.ones_like(PLACES)}):  # fmt: skip
        model = WithKinds(lambda table, kinds: 0 * table[kinds]).to(DEVICE)
        tuner = TestTimeFinetuner(model, capture=False)
        calls: list[Any] = []
        model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        for inputs in ({"kinds": PLACES} if "kinds" in given else {}, given):
            calls.clear()
            torch.manual_seed(1)
            adapt(model, tuner, **inputs)
        runs.append(len(calls))
        states.append((int(model.calls), torch.rand(1).item()))
    assert runs == [2, 2, 2, 3, 2]
    assert states == [states[0]] * 5


def test_a_table_that_became_smaller_is_tried_again() -> None:
    model = WithKinds().to(DEVICE)
    tuner = TestTimeFinetuner(model, capture=False)
    adapt(model, tuner, kinds=PLACES)
    model.table = nn.Parameter(model.table[:5].detach().clone())
    with pytest.raises(ValueError, match=r"\['kinds'\]: expected indices in \[-5, 5\)"):
        adapt(model, tuner, kinds=PLACES)


def test_an_error_of_another_kind_is_the_passs_own() -> None:
    def failing(table: Tensor, kinds: Tensor) -> Tensor:
        raise RuntimeError("of the forward")

    model = WithKinds(failing).to(DEVICE)
    with pytest.raises(RuntimeError, match="of the forward"):
        adapt(model, TestTimeFinetuner(model, capture=False), kinds=PLACES)


def test_compiled_models() -> None:
    model = WithKinds().to(DEVICE)
    whole: Any = torch.compile(model, backend="eager")
    tuner = TestTimeFinetuner(whole, capture=False)
    adapt(whole, tuner, kinds=PLACES)
    with pytest.raises(ValueError, match=r"\['kinds'\]: expected indices"):
        adapt(whole, tuner, kinds=PLACES + 40)


@pytest.mark.parametrize("module", [lookups, pass_modes])
@pytest.mark.skipif(DEVICE.type == "cuda", reason="a bad index would end the process")
def test_no_look_outlives_a_signal(module: ModuleType) -> None:
    model = WithKinds()
    at_every = AtEvery(lambda: signal.raise_signal(signal.SIGALRM), modules=(module,))

    def query() -> None:
        with suppress(TimeoutError):
            adapt(model, TestTimeFinetuner(model), kinds=PLACES)

    def check(_: bool) -> None:
        with pytest.raises(IndexError):  # torch's own
            F.embedding(torch.tensor([5]), torch.zeros(2, 2))

    with raising(signal.SIGALRM, TimeoutError):
        at_every.run(query, check)
    assert {"__exit__", "check"} & at_every.where
