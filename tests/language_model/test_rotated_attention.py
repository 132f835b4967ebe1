# SPDX-License-Identifier: Apache-2.0
"""Attention that leaves the gradients of what was rotated, in place of those of q and k.

In Triton's interpreter on CPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _fused import DEVICE, DTYPES, random
from hullkit.language_model import rotary, short_attention
from hullkit.language_model.fused_functions import FusedFunctions
from hullkit.language_model.fused_modules import stand_ins
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []  # there they run on it


@pytest.fixture(autouse=True)
def many_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_attention, "_MANY_PROGRAMS", 0)


@pytest.fixture
def turned(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each launch of the rotation's own kernel, whether it was for gradients."""
    seen: list[bool] = []
    launch = rotary._launch

    def noted(*inputs: Any, backward: bool) -> tuple[Tensor, Tensor]:
        seen.append(backward)
        return launch(*inputs, backward=backward)

    monkeypatch.setattr(rotary, "_launch", noted)
    return seen


def _inputs(width: int, tables: int, dtype: torch.dtype, table: torch.dtype) -> Sequence[Tensor]:
    q = random(2, 70, 4, width, dtype=dtype).transpose(1, 2)
    k, v = (random(2, 70, 2, width, dtype=dtype, seed=i).transpose(1, 2) for i in (1, 2))
    angles = random(tables, 70, width, seed=3)
    return q, k, v, angles.cos().to(table), angles.sin().to(table)


def _gradients(
    inputs: Sequence[Tensor], leaves: bool, trained: str = "qkv", more: bool = False
) -> list[Tensor | None]:
    """Of q, k and v. leaves: whether attention knows the rotation. more: somebody else reads k."""
    q, k, v, cos, sin = inputs
    own = [
        x.clone().requires_grad_(name in trained) for x, name in zip((q, k, v), "qkv", strict=True)
    ]
    (q, k), rotation = rotary.rotary(own[0], own[1], cos, sin)
    half = torch.bfloat16 if q.dtype is torch.bfloat16 else torch.float16
    y = short_attention.causal_attention(q, k, own[2], 0.3, half, rotation if leaves else None)
    loss = y.float().square().sum()
    if more:
        loss = loss + k.float().square().sum()
    loss.backward()
    return [x.grad for x in own]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table", DTYPES)
@pytest.mark.parametrize(("width", "tables"), [(16, 1), (64, 2)])
def test_the_same_bits_as_one_after_the_other(
    width: int, tables: int, dtype: torch.dtype, table: torch.dtype, turned: list[bool]
) -> None:
    inputs = _inputs(width, tables, dtype, table)
    found = _gradients(inputs, leaves=True)
    assert turned == [False]
    for one, other in zip(found, _gradients(inputs, leaves=False), strict=True):
        assert one is not None
        assert other is not None
        assert one.dtype is dtype
        assert torch.equal(one, other)


def test_with_another_reader(turned: list[bool]) -> None:
    """Its gradient and the one that was left are added; each was rounded before."""
    inputs = _inputs(32, 1, torch.float32, torch.float32)
    found = _gradients(inputs, leaves=True, more=True)
    assert turned == [False, True]
    for one, other in zip(found, _gradients(inputs, leaves=False, more=True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_two_readers_and_two_backward_passes(turned: list[bool]) -> None:
    """Both readers leave gradients, and nothing is left from one backward pass to the next."""
    q, k, v, cos, sin = _inputs(32, 1, torch.float32, torch.float32)
    found = []
    for leaves in (True, False):
        own = [x.clone().requires_grad_() for x in (q, k)]
        (a, b), rotation = rotary.rotary(*own, cos, sin)
        given = rotation if leaves else None
        attend = partial(short_attention.causal_attention, a, b)
        loss = attend(v, 0.3, torch.float16, given).float().square().sum()
        loss = loss + attend(2 * v, 0.2, torch.float16, given).float().square().sum()
        turned.clear()
        passes = [torch.autograd.grad(loss, own, retain_graph=True) for _ in range(2)]
        assert turned == ([] if leaves else [True, True])
        assert all(map(torch.equal, *passes))
        found.append(passes[0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_second_derivative_is_refused() -> None:
    q, k, v, cos, sin = _inputs(32, 1, torch.float32, torch.float32)
    own = q.requires_grad_()
    (a, b), rotation = rotary.rotary(own, k.requires_grad_(), cos, sin)
    y = short_attention.causal_attention(a, b, v, 0.3, torch.float16, rotation)
    [first] = torch.autograd.grad(y.float().square().sum(), own, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


@pytest.mark.parametrize("roles", ["qk", "kq", "qq", "kk"])
def test_which_result_is_read_as_what(roles: str) -> None:
    """Attention that reads one result twice, or both the other way round, leaves nothing."""
    x = random(2, 4, 70, 32), random(2, 4, 70, 32, seed=1), random(2, 4, 70, 32, seed=2)
    angles = random(1, 70, 32, seed=3)
    found = []
    for notes in (True, False):
        q, k = (t.clone().requires_grad_() for t in x[:2])
        results, rotation = rotary.rotary(q, k, angles.cos(), angles.sin())
        functions = FusedFunctions(backend="triton")
        if notes:
            functions.note_rotation(*results, rotation)
        read = [results["qk".index(role)] for role in roles]
        with torch.autocast(DEVICE.type, torch.bfloat16), functions:
            y = F.scaled_dot_product_attention(*read, x[2], is_causal=True)
        y.float().square().sum().backward()
        found.append((q.grad, k.grad))
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("trained", ["q", "k", "v", "qk"])
def test_what_is_trained(trained: str, turned: list[bool]) -> None:
    inputs = _inputs(32, 1, torch.float32, torch.float32)
    found = _gradients(inputs, leaves=True, trained=trained)
    assert turned == [False]
    for one, other in zip(found, _gradients(inputs, False, trained=trained), strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one, other)


def test_no_width_that_a_kernel_pads(turned: list[bool]) -> None:
    inputs = _inputs(24, 1, torch.float32, torch.float32)
    found = _gradients(inputs, leaves=True)
    assert turned == [False, True]
    for one, other in zip(found, _gradients(inputs, leaves=False), strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


@pytest.mark.parametrize("reader", ["attention", "a hook too"])
def test_in_a_model(reader: str, turned: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer's attention leaves its gradients, unless somebody waits for those of q."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(DEVICE, torch.bfloat16)
    ids = torch.randint(50, (1, 40), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    note = FusedFunctions.note_rotation

    def hooked(self: FusedFunctions, q: Tensor, *others: Any) -> None:
        q.retain_grad()
        note(self, q, *others)

    def passed() -> list[Tensor]:
        turned.clear()
        model.zero_grad()
        with stand_ins(model, backend="triton", plain_positions=True):
            model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    passed()  # tries the model's own function
    if reader == "attention":
        found = passed()
        assert turned == [False, False]
    monkeypatch.setattr(FusedFunctions, "note_rotation", hooked)
    wanted = passed()
    assert turned == [False, False, True, True]
    if reader == "attention":
        assert all(map(torch.equal, found, wanted))
