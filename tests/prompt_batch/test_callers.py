# SPDX-License-Identifier: Apache-2.0
"""What the code around a PromptBatch may do: modes of torch, copies, writes to the model."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import hullkit
import pytest
import torch
import torch.nn.functional as F
from hullkit.language_model.torch_settings import autocast_depth
from hullkit.prompt_batch import Score
from torch import Tensor, nn

ROWS, WIDTH = 12, 8
IDS = torch.randint(ROWS, (9,), generator=torch.Generator().manual_seed(0))
QUERY = hullkit.Query([IDS], [6], Score(IDS))
OPTIONS: dict[str, Any] = {"slots": 2, "rank": 2, "lr": 0.05}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, ROWS)
        self.layer: nn.Module = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.layer(self.embedding(ids))))
        return y


class Encoder(Model):
    """torch's layer may read its parts' weights past their forwards, if nothing is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        y: Tensor = self.head(self.layer(self.embedding(ids), src_mask=mask))
        return y


def made(model: nn.Module | None = None) -> hullkit.PromptBatch:
    return hullkit.PromptBatch(Model() if model is None else model, target=["layer"], **OPTIONS)


def values(batch: hullkit.PromptBatch) -> list[Any]:
    answers = list(batch.map([QUERY] * 3))
    assert [answer.error for answer in answers] == [None] * 3
    return [(answer.value, answer.losses) for answer in answers]


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("made_inside", [False, True])
def test_modes_of_the_caller(mode: str, made_inside: bool) -> None:
    wanted = values(made())
    model = Model()
    with MODES[mode]() if made_inside else nullcontext():
        batch = made(model)
    with MODES[mode]():
        assert values(batch) == wanted
    assert values(batch) == wanted


COPIED = pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["deep", "pickled"]
)


@COPIED
def test_a_copy_learns_too(copied: Callable[[Any], Any]) -> None:
    batch = made()
    assert values(copied(batch)) == values(batch)


@COPIED
def test_a_copy_made_in_a_slots_block_stays_adapted(copied: Callable[[Any], Any]) -> None:
    batch = made()
    batch.adapt_([QUERY])
    with batch.slot(0) as model:
        wanted = model(IDS[None])
        other = copied(model)
    assert torch.equal(other(IDS[None]), wanted)
    assert not torch.equal(model(IDS[None]), wanted)


def test_what_the_slots_were_made_for_stays() -> None:
    batch = made()
    assert (batch.betas, batch.eps, batch.precision) == ((0.9, 0.999), 1e-8, "float32")
    names = inspect.signature(hullkit.PromptBatch).parameters.keys() - {"lr", "seed"}
    assert len(names) == 13
    for name in names:
        getattr(batch, name)
        with pytest.raises(AttributeError, match=name):
            setattr(batch, name, 3)
    batch.lr, batch.seed = 0.1, 5
    with pytest.raises(ValueError, match="lr: expected a number >= 0"):
        batch.lr = float("nan")
    with pytest.raises(ValueError, match="seed: expected an int"):
        batch.seed = -1
    assert (batch.lr, batch.seed) == (0.1, 5)


def test_a_weight_that_a_hook_makes_anew() -> None:
    """Where products read a copy in half precision, it would be as old as the last forward."""
    model = Model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch prefers its parametrization
        torch.nn.utils.weight_norm(model.layer)
    batch = hullkit.PromptBatch(
        model, target=["layer"], precision="bf16", **OPTIONS | {"lr": 0.0, "slots": 1}
    )
    query = hullkit.Query([IDS], [1])
    before = next(batch.map([query])).losses
    model.layer.weight_g.data.mul_(20.0)
    after = next(batch.map([query])).losses  # first: a forward of the model makes the weight
    with torch.no_grad():
        wanted = float(F.cross_entropy(model(IDS[None])[0, :-1], IDS[1:]))
    assert after == pytest.approx((wanted,), rel=1e-2)
    assert before != pytest.approx((wanted,), rel=2e-2)


def test_weights_written_between_two_answers_are_read() -> None:
    batch = hullkit.PromptBatch(Model(), precision="bf16", **OPTIONS)
    answers = batch.map([QUERY] * 8)
    next(answers)
    ids = IDS.expand(2, -1)
    before = batch(ids)
    with torch.no_grad():
        batch.model.get_submodule("layer").weight.add_(1.0)
    assert not torch.equal(batch(ids), before)
    assert len(list(answers)) == 7


@pytest.mark.gpu
@pytest.mark.plain_memory
def test_a_graph_keeps_the_copies_that_it_reads() -> None:
    """A block of another precision has copies of its own."""
    batch = hullkit.PromptBatch(Model().cuda(), precision="bf16", capture=True, **OPTIONS)

    def then(model: nn.Module) -> None:
        with torch.autocast("cuda", torch.float16), torch.no_grad():
            model(IDS[None].cuda())

    wanted = values(batch)
    assert [answer.error for answer in batch.map([hullkit.Query([IDS], [1], then)])] == [None]
    taken = [torch.full((WIDTH, WIDTH), 1e3, device="cuda").bfloat16() for _ in range(50)]
    assert values(batch) == wanted
    assert taken


def test_a_layer_that_was_replaced() -> None:
    batch = made()
    batch.model.layer = nn.Linear(WIDTH, WIDTH)
    with pytest.raises(RuntimeError, match="layer: expected the layer of which the batch was made"):
        values(batch)


def test_layers_that_do_not_run_or_reach_no_loss() -> None:
    class Reads(Model):
        def forward(self, ids: Tensor) -> Tensor:
            y: Tensor = self.head(self.embedding(ids) @ self.layer.weight)
            return y

    class Detached(Model):
        def forward(self, ids: Tensor) -> Tensor:
            y: Tensor = self.head(self.layer(self.embedding(ids)).detach())
            return y

    for model, got in ((Reads(), "none"), (Detached(), "a loss that depends on none")):
        words = f"chosen layers to run in a pass and its loss to depend on one, got {got}$"
        with pytest.raises(RuntimeError, match=words):
            values(made(model))


def test_an_encoder_layer_takes_no_shortcut() -> None:
    batch = hullkit.PromptBatch(Encoder(), target=["linear1", "linear2"], **OPTIONS)
    [answer] = batch.map([QUERY])
    assert answer.value < min(answer.losses)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("before", [True, False])
def test_blocks_that_do_not_end_in_turn(before: bool) -> None:
    """torch's shortcut is as before with the last one, and casts are kept no longer than that."""
    first, second = (batch.slot(0) for batch in (made(), made()))
    torch.backends.mha.set_fastpath_enabled(before)
    try:
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert not torch.backends.mha.get_fastpath_enabled()
        second.__exit__(None, None, None)
        assert torch.backends.mha.get_fastpath_enabled() == before
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert autocast_depth() == 0


@pytest.mark.parametrize(
    ("precision", "dtype"), [("float32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_layers_with_factors_have_the_precision_of_the_pass(
    precision: str, dtype: torch.dtype
) -> None:
    seen = []

    class Notes(Model):
        def forward(self, ids: Tensor) -> Tensor:
            y = self.layer(self.embedding(ids))
            if torch.is_grad_enabled():  # a pass that learns
                seen.append(y.dtype)
            out: Tensor = self.head(y)
            return out

    batch = hullkit.PromptBatch(Notes(), target=["layer"], precision=precision, **OPTIONS)
    [answer] = batch.map([QUERY])
    assert answer.error is None
    assert set(seen) == {dtype}


def test_a_score_that_is_not_finite() -> None:
    model = Model()
    model.head.bias.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="ids: expected a finite loss, got nan"):
        Score(IDS)(model)


@pytest.mark.parametrize("trained", [False, True])
def test_what_the_caller_trains_is_as_before(trained: bool) -> None:
    model = Model().requires_grad_(trained)

    def then(adapted: Any) -> None:
        adapted.requires_grad_(not trained)

    [answer] = hullkit.PromptBatch(model, **OPTIONS).map([hullkit.Query([IDS], [1], then)])
    assert answer.error is None
    assert {p.requires_grad for p in model.parameters()} == {trained}
