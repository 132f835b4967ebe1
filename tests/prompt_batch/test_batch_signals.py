# SPDX-License-Identifier: Apache-2.0
"""PromptBatch: a signal's handler that raises at any moment leaves the model as it was."""

from __future__ import annotations

import signal
from contextlib import suppress
from typing import Any

import hullkit
import pytest
import torch
from _models import Before, llama
from _prompts import is_fresh
from _signals import AtEvery, raising
from hullkit.language_model import fused_modules, loss, replaced_globals
from hullkit.prompt_batch import Score, borrowed, factors, layers, slot_forwards, stream
from transformers.models.llama import modeling_llama

# What happens inside of the blocks. Around them, a tracer raises where no signal can.
MODULES = (borrowed, layers, loss)
IDS = torch.arange(9)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("what", ["map", "slot", "call"])
def test_signal_at_any_moment(what: str) -> None:
    model = llama()
    prompts = hullkit.PromptBatch(model, slots=1, rank=1, capture=False)  # it stays of use
    interrupted = False

    def leave() -> None:
        with prompts.slot(0) as lent:
            assert lent is model

    uses: dict[str, Any] = {
        "map": lambda: list(prompts.map([([IDS], [1], Score(IDS))])),
        "slot": leave,
        "call": lambda: prompts(IDS[None]),
    }

    def run() -> None:
        nonlocal interrupted
        interrupted = False
        try:
            uses[what]()
        except TimeoutError:
            interrupted = True

    def check(sent: bool) -> None:
        before.check()
        assert torch.is_grad_enabled()
        # An error of a query is its answer's.
        assert interrupted == sent or what == "map"

    at_every = AtEvery(lambda: signal.raise_signal(signal.SIGALRM), MODULES)
    with raising(signal.SIGALRM, TimeoutError):
        before = Before(model)
        at_every.run(run, check)
    assert at_every.where >= {"_claim", "_enter", "_leave"}


@pytest.mark.usefixtures("one_thread")
def test_signal_as_the_model_is_tried_with_other_factors() -> None:
    """What shows whether rows change each other must not stay in the slots."""
    model = llama()
    prompts = hullkit.PromptBatch(model, slots=2, rank=1, capture=False)
    rows = IDS.expand(2, -1)
    wanted = prompts(rows)

    def run() -> None:
        with suppress(TimeoutError):
            prompts._passes.logits_of_tried_slots(rows, 0)

    def check(_: bool) -> None:
        before.check()
        assert torch.is_grad_enabled()
        assert torch.equal(prompts(rows), wanted)

    modules = (slot_forwards, torch.autograd.grad_mode)
    functions = ("_claim", "_enter", "_leave", "_forward", "__enter__", "__exit__")
    at_every = AtEvery(lambda: signal.raise_signal(signal.SIGALRM), modules, functions)
    with raising(signal.SIGALRM, TimeoutError):
        before = Before(model)
        at_every.run(run, check)
    assert at_every.where == set(functions)


@pytest.mark.usefixtures("one_thread", "replaced_on_a_cpu")
def test_signal_as_what_models_compute_is_put_back() -> None:
    model = llama()
    prompts = hullkit.PromptBatch(model, slots=1, rank=1, capture=False)
    rotate = modeling_llama.apply_rotary_pos_emb
    at_every = AtEvery(
        lambda: signal.raise_signal(signal.SIGALRM), modules=(fused_modules, replaced_globals),
        functions=("stand_ins", "replaced_globals", "begin", "end"),
    )  # fmt: skip

    def run() -> None:
        with suppress(TimeoutError):
            list(prompts.map([([IDS], [1])]))

    def check(_: bool) -> None:
        before.check()
        assert modeling_llama.apply_rotary_pos_emb is rotate

    with raising(signal.SIGALRM, TimeoutError):
        before = Before(model)
        at_every.run(run, check)
    assert at_every.where == {"stand_ins", "replaced_globals", "begin", "end"}


@pytest.mark.usefixtures("one_thread")
def test_signal_as_slots_become_fresh_again() -> None:
    prompts = hullkit.PromptBatch(llama(), slots=2, rank=1, capture=False)
    functions = ("close", "_reset", "reset_", "_copy")
    at_every = AtEvery(lambda: signal.raise_signal(signal.SIGALRM), (stream, factors), functions)

    def run() -> None:
        with suppress(TimeoutError):
            answers = prompts.map([([IDS], [1]), ([IDS], [9])])
            next(answers)  # the second is under way
            answers.close()

    def check(_: bool) -> None:
        assert all(is_fresh(prompts, slot) for slot in range(2))
        prompts.adapt_([([IDS], [1])] * 2)  # none is fresh before the next

    with raising(signal.SIGALRM, TimeoutError):
        at_every.run(run, check)
    assert at_every.where == {*functions}
