# SPDX-License-Identifier: Apache-2.0
"""`adapt_`, which keeps what was trained: if it raises, whenever that is, all is as before."""

from __future__ import annotations

import signal

import pytest
import torch
from _models import Before, plain, state, texts
from _signals import AtEvery, raising
from hullkit.finetune import TestTimeFinetuner, adaptation, snapshot

ENDS = ("_enter", "_leave", "restore_all_but_values", "_restore_flags", "_restore_training")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("held_back", [True, False], ids=["signal", "error"])
def test_an_error_at_any_moment(held_back: bool) -> None:
    """A signal that comes as the block is left is heard once it has been."""
    model = plain()
    tuner = TestTimeFinetuner(model, lr=1e-2)
    base = state(model)
    raised = False

    def act() -> None:
        if held_back:
            signal.raise_signal(signal.SIGALRM)
        raise TimeoutError

    def query() -> None:
        nonlocal raised
        try:
            tuner.adapt_(texts(1), [2])
            raised = False
        except TimeoutError:
            raised = True

    def check(sent: bool) -> None:
        assert raised == sent
        assert (tuner.last_report is None) == sent
        if not sent:
            assert not torch.equal(model.head.weight, base["head.weight"])
            for name, tensor in model.state_dict().items():
                if name != "repeated":  # one element, as it was
                    tensor.copy_(base[name])
        before.check()

    at_every = AtEvery(act, (adaptation, snapshot), functions=ENDS)
    with raising(signal.SIGALRM, TimeoutError):
        before = Before(model)
        at_every.run(query, check)
    assert at_every.where == set(ENDS)
