# SPDX-License-Identifier: Apache-2.0
"""Exported adapters: PEFT loads them into the same layers, or there are none."""

from __future__ import annotations

import shutil
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import _architectures
import pytest
import torch
from _models import VOCABULARY, Before, llama
from _prompts import DEVICE, batch_of, query, text
from _signals import AtEvery, raising
from hullkit.prompt_batch import borrowed, export
from torch import Tensor, nn

peft = pytest.importorskip("peft", reason="an extra is not installed")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
if DEVICE.type == "cuda":
    pytestmark += [pytest.mark.gpu]


@pytest.mark.parametrize("inside", [False, True])
def test_rank_stabilised_adapters(inside: bool, tmp_path: Path) -> None:
    """alpha / sqrt(rank); also of a slot whose block is open."""
    model = llama().to(DEVICE)
    batch = batch_of(model, 2, rslora=True, rank=9, capture=False)
    [first, _] = batch.adapt_([query(0), query(1)])
    assert first.error is None
    ids = text(12, 5)[None].to(DEVICE)
    if inside:
        with batch.slot(0), torch.no_grad():
            batch.export(0, tmp_path)
            wanted = model(ids).logits
    else:
        batch.export(0, tmp_path)
        with batch.slot(0), torch.no_grad():
            wanted = model(ids).logits
    loaded = peft.PeftModel.from_pretrained(llama().to(DEVICE), str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, wanted, rtol=1e-4, atol=1e-5)
        base = llama().to(DEVICE)(ids).logits
    assert float((wanted - base).norm() / base.norm()) > 0.01


@pytest.mark.parametrize("directory", [None, 3])
def test_a_directory_that_is_no_path(directory: Any) -> None:
    got = type(directory).__name__
    with pytest.raises(TypeError, match=f"directory: expected a str or a path, got {got}"):
        batch_of(llama().to(DEVICE), 1).export(0, directory)


def test_the_model_is_as_before(tmp_path: Path) -> None:
    """PEFT freezes what it adapts; the check must not freeze the user's model."""
    model = llama().to(DEVICE)
    model.model.embed_tokens.weight.requires_grad_(False)
    before = [(name, p.requires_grad, id(p)) for name, p in model.named_parameters()]
    modules = list(model.modules())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]
    batch_of(model, 1).export(0, tmp_path)
    assert [(name, p.requires_grad, id(p)) for name, p in model.named_parameters()] == before
    assert list(model.modules()) == modules
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules] == hooks
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(
    ("name", "words"),
    [("deepseek_v3", "for which it takes another layer, or none"), ("mamba", "out_proj")],
)
def test_layers_that_peft_does_not_adapt_are_refused(name: str, words: str, tmp_path: Path) -> None:
    model: Any = _architectures.build(name).to(DEVICE)
    batch = batch_of(model, 1, capture=False)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"target: expected layers that PEFT .*{words}"):
            batch.export(0, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


class Twice(nn.Module):
    """Its inner layer has two names; forward uses the second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.inner = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8)
        self.alias, self.other, self.head = self.inner, nn.Linear(8, 8), nn.Linear(8, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.other(self.alias(self.embedding(ids))))
        return logits


def test_a_layer_with_two_names_is_refused(tmp_path: Path) -> None:
    """Where it gets an adapter; another may have two."""
    batch_of(Twice().to(DEVICE), 1, target=["other"], capture=False).export(
        0, tmp_path / "of other"
    )
    batch = batch_of(Twice().to(DEVICE), 1, target=["inner"], capture=False)
    with pytest.raises(ValueError, match="one name for each layer, got 'inner' and 'alias'"):
        batch.export(0, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_an_export_draws_none_of_the_callers_random_numbers(tmp_path: Path) -> None:
    """PEFT initialises the factors of the adapter that is loaded once, to see whether it can be."""
    batch = batch_of(llama().to(DEVICE), 1, capture=False)
    before = torch.get_rng_state()
    batch.export(0, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_export_that_is_cut_short(tmp_path: Path) -> None:
    """As PEFT loads it: flags are as before, and nothing is written. As files are copied: those of
    an earlier export are whole."""
    model = llama().to(DEVICE)
    batch = batch_of(model, 1, capture=False)
    before = Before(model)
    at_every = AtEvery(
        lambda: signal.raise_signal(signal.SIGALRM), (export, borrowed, shutil),
        functions=("_check_loads", "_leave", "copyfile"),
    )  # fmt: skip
    written: list[str] = []

    def run() -> None:
        batch._loads = False
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        with suppress(KeyboardInterrupt):
            batch.export(0, tmp_path / "new")
        written[:] = sorted(path.name for path in (tmp_path / "new").glob("*"))

    def check(sent: bool) -> None:
        before.check()
        assert written == ([] if sent else ["adapter_config.json", "adapter_model.safetensors"])

    with raising(signal.SIGALRM, KeyboardInterrupt):
        at_every.run(run, check)
    assert at_every.where == {"_check_loads", "_leave", "copyfile"}
