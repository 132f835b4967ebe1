# SPDX-License-Identifier: Apache-2.0
"""PromptBatch: a signal's handler that raises at any moment leaves the model as it was."""

from __future__ import annotations

import signal
from typing import Any

import hullkit
import pytest
import torch
from _models import Before, llama
from _signals import AtEvery, raising
from hullkit.language_model import loss
from hullkit.prompt_batch import Score, borrowed, layers

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
