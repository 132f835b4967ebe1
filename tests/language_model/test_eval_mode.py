# SPDX-License-Identifier: Apache-2.0
"""Scores and other forwards that only read a model: whatever raises, flags and settings stay."""

from __future__ import annotations

import signal

import hullkit
import pytest
import torch
from _models import Before, llama
from _signals import AtEvery, raising
from hullkit.language_model import eval_mode, interface, product_settings
from hullkit.prompt_batch.layers import _computes_the_product
from torch import nn


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("what", ["score", "layer"])
def test_signal_at_any_moment(what: str) -> None:
    model = llama()
    interrupted = False

    def run() -> None:
        nonlocal interrupted
        try:
            if what == "score":
                hullkit.bits_per_byte(model, torch.arange(9), 8)
            else:
                assert _computes_the_product(model.lm_head)
            interrupted = False
        except TimeoutError:
            interrupted = True

    def check(sent: bool) -> None:
        before.check()
        assert torch.is_grad_enabled()
        assert not product_settings.open_blocks()
        assert interrupted == sent

    # What happens inside of the block. On the block's line a tracer raises where no signal can.
    functions = ("_claim", "_enter", "_leave", "logits_of", "_follow", "_set")
    modules = (eval_mode, interface, product_settings)
    at_every = AtEvery(lambda: signal.raise_signal(signal.SIGALRM), modules, functions)
    with raising(signal.SIGALRM, TimeoutError):
        before = Before(model)
        at_every.run(run, check)
    assert at_every.where >= {"_claim", "_enter", "_leave"}


@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated")
def test_modules_of_torch_jit() -> None:
    """They keep their flags where an attribute of the Python object does not reach."""
    model = nn.Sequential(nn.Embedding(16, 8), nn.Dropout(), nn.Linear(8, 16))
    scripted = torch.jit.script(model)
    ids = torch.arange(9)
    assert hullkit.bits_per_byte(scripted, ids, 8) == hullkit.bits_per_byte(model, ids, 8)
    assert scripted.training


def test_modules_with_an_eval_of_their_own_are_not_asked() -> None:
    class Merging(nn.Embedding):
        def train(self, mode: bool = True) -> nn.Embedding:
            raise AssertionError("merged")

    model = Merging(4, 4)
    assert hullkit.bits_per_byte(model, torch.arange(4), 3) > 0.0
    assert model.training
