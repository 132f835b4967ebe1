# SPDX-License-Identifier: Apache-2.0
"""Host tensors of a forward pass: noted in one pass, served in the next.

The meta device stands for a GPU: moves to it are seen the same way. It computes no values.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hullkit.language_model.host_constants import HostConstants
from torch import Tensor

META = torch.device("meta")


def to(x: Tensor) -> Tensor:
    return x + torch.tensor(2.5).to(x.device, torch.float16)


def tensor_on_the_device(x: Tensor) -> Tensor:
    return x * torch.tensor([1.0, 2.0, 3.0], device=x.device)


def as_tensor_on_the_device(x: Tensor) -> Tensor:
    return x * torch.as_tensor([1.0, 2.0, 3.0], device=x.device)


def new_tensor(x: Tensor) -> Tensor:
    return x * x.new_tensor([1.0, 2.0, 3.0])


def copy(x: Tensor) -> Tensor:
    y = x.clone()
    y[0] = torch.tensor(7.0)
    return y


def where(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.tensor(float("-inf")))


def index(x: Tensor) -> Tensor:
    return x[torch.tensor([2, 0, 1])]


def index_by_list(x: Tensor) -> Tensor:
    return x[[2, 0, 1]] + x.expand(2, 3)[..., [2, 0, 1]]


def copy_by_list(x: Tensor) -> Tensor:
    y = x.clone()
    y[[0, 2]] = 7.0
    return y


MOVES = [
    to, tensor_on_the_device, as_tensor_on_the_device, new_tensor, copy, where, index,
    index_by_list, copy_by_list,
]  # fmt: skip


@pytest.mark.parametrize("forward", MOVES)
def test_values_that_move_are_noted_and_served(forward: Callable[[Tensor], Tensor]) -> None:
    x = torch.ones(3, device=META)
    plain = forward(x)
    constants = HostConstants(META)
    with constants.noted():
        noted = forward(x)
    assert constants.count == 1
    with constants.served():
        served = forward(x)
    for got in (noted, served):
        assert (got.shape, got.dtype, got.device) == (plain.shape, plain.dtype, plain.device)
    with (
        pytest.raises(RuntimeError, match="differs from pass to pass"),
        HostConstants(META).served(),
    ):
        forward(x)


def test_equal_values_share_a_copy_and_others_do_not() -> None:
    constants = HostConstants(META)
    with constants.noted():
        for value in (0.0, -0.0, 0.0):
            torch.tensor(value).to(META)
        torch.tensor(0.0, dtype=torch.float64).to(META)
        torch.zeros(1).to(META)
    assert constants.count == 4


def test_a_pass_without_host_tensors_notes_nothing() -> None:
    constants = HostConstants(META)
    x = torch.ones(3, device=META, requires_grad=True)
    with constants.noted():
        (x * 2.0 + torch.arange(3, device=META)).mul(torch.tensor(3.0)).sum().backward()
    assert constants.count == 0


def test_a_counter_is_refused() -> None:
    calls = 0

    def forward(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x + torch.tensor([calls]).to(x.device)

    constants = HostConstants(META)
    x = torch.ones(3, device=META)
    with constants.noted():
        forward(x)
    with (
        pytest.raises(RuntimeError, match=r"differs from pass to pass, of shape \(1,\)"),
        constants.served(),
    ):
        forward(x)


def test_a_tensor_of_the_model_is_refused() -> None:
    """Its value may change between two replays, which read the same copy."""
    weight = torch.ones(2, 3)
    constants = HostConstants(META, [weight])
    with (
        pytest.raises(
            RuntimeError, match=r"a parameter or buffer of shape \(3,\) lies on the host"
        ),
        constants.noted(),
    ):
        weight[1].to(META)


QUESTIONS: list[Callable[[Tensor], object]] = [
    lambda x: x.sum().item(),
    lambda x: bool(x.sum() > 0),
    lambda x: x.cpu(),
    lambda x: torch.empty(3, device="cpu").copy_(x),
    lambda x: x.nonzero(),
    lambda x: x[x > 0],
    lambda x: torch.unique(x),
    lambda x: x.tolist(),
]


@pytest.mark.parametrize("question", QUESTIONS)
def test_questions_are_refused_by_name(question: Callable[[Tensor], object]) -> None:
    x = torch.ones(3, device=META)
    with (
        pytest.raises(RuntimeError, match=r"forward asks the device for values \(aten\."),
        HostConstants(META).served(),
    ):
        question(x)


def test_the_backward_pass_is_watched_too() -> None:
    """Checkpointed layers run again there."""

    class Asking(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, *grads: Tensor) -> Tensor:
            return grads[0] * torch.tensor([4.0]).to(META)

    x = torch.ones(3, device=META, requires_grad=True)
    y: Tensor = Asking.apply(x)  # type: ignore[no-untyped-call]
    with (
        pytest.raises(RuntimeError, match="differs from pass to pass"),
        HostConstants(META).served(),
    ):
        y.sum().backward()
