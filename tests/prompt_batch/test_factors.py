# SPDX-License-Identifier: Apache-2.0
"""The memory of slots' factors: updates, resets, and the row beyond all slots."""

from __future__ import annotations

import pytest
import torch
from _prompts import DEVICE
from hullkit.prompt_batch.factors import SlotFactors
from hullkit.prompt_batch.layers import Layer
from torch import nn

if DEVICE.type == "cuda":
    pytestmark = [pytest.mark.gpu]


# The interpreter cuts bfloat16 instead of rounding it.
BOUNDS = {"params": 1e-5, "exp_avg": 1e-5, "exp_avg_sq": 1e-5, "copies": 2**-7}


def factors_of(backend: str | None) -> SlotFactors:
    layers = [Layer("0", nn.Linear(5, 9).to(DEVICE)), Layer("1", nn.Linear(600, 3).to(DEVICE))]
    factors = SlotFactors(
        layers, 3, 4, DEVICE, torch.bfloat16, (0.9, 0.99), 1e-8, 0.5, False, backend
    )  # fmt: skip
    for slot in range(3):
        factors.reset_([slot], slot)
    return factors


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # inf, by the interpreter
def test_the_kernel_updates_and_resets_as_torch_does() -> None:
    both, found = [factors_of("triton"), factors_of(None)], []
    random = torch.Generator().manual_seed(0)
    gradient = torch.randn(both[0].params.shape, generator=random).to(DEVICE)
    for factors in both:
        before = factors.params.clone()
        factors.grads.copy_(gradient)
        broken = torch.zeros(3, dtype=torch.int32, device=DEVICE)
        for done in (0, 2):
            control = factors.control([2, 0, 1], [done, 0, 0], [0.1, 0.1, 0.2], 2)
            factors.update_(control.to(DEVICE), broken)
        assert not broken.any()
        assert torch.equal(before[1], factors.params[1])
        assert not torch.isclose(before[0], factors.params[0]).any()
        updated = [getattr(factors, name).clone() for name in BOUNDS]
        factors.reset_([0], 7)
        factors.grads[2] = float("inf")
        for steps in (0, 1):  # nobody reads the gradients of a slot without updates
            control = factors.control([1, 1, steps], [0, 0, 4], [0.0, 0.0, 0.0], 2)
            factors.update_(control.to(DEVICE), broken)
            assert broken.tolist() == [0, 0, steps]
        ends = [getattr(factors, name)[:2] for name in BOUNDS]
        found.append((*updated, *ends))
    for of_kernel, of_torch, bound in zip(*found, (*BOUNDS.values(),) * 2, strict=True):
        torch.testing.assert_close(of_kernel, of_torch, rtol=bound, atol=1e-6)


def test_a_slot_in_the_row_beyond_all_slots() -> None:
    """A pass there reads the slot's factors, and its gradients become the slot's."""
    layer = Layer("0", nn.Linear(5, 9).to(DEVICE))
    factors = SlotFactors([layer], 2, 4, DEVICE, None, (0.9, 0.99), 1e-8, 1.0, True, None)
    for slot in range(2):
        factors.reset_([slot], slot)
    factors.to_spare(1)
    assert torch.equal(layer.a[2], layer.a[1])
    assert not torch.equal(layer.a[2], layer.a[0])
    layer.d_a[2], layer.d_b[2] = 3.0, 5.0
    before = layer.a.clone()
    factors.from_spare(1)
    broken = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    control = factors.control([0, 1], [0, 0], [0.1, 0.1], 1)
    factors.update_(control.to(DEVICE), broken)
    torch.testing.assert_close(layer.a[1], before[1] - 0.1)
    torch.testing.assert_close(layer.b[1], torch.full_like(layer.b[1], -0.1))
    assert torch.equal(layer.a[::2], before[::2])
