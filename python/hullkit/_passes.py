"""A query's passes and updates one by one, as any device runs them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ._loss import CausalLoss
from ._report import Clock
from .optim import Adam, accumulate_
from .schedule import Reuse

Inputs = dict[str, Tensor]


def check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(f"{name}: expected a finite number, got {value}")


def warm_up(loss_of: CausalLoss, inputs: list[Inputs], parameters: list[nn.Parameter]) -> None:
    """A pass for each, for what is compiled at the first; nothing is updated."""
    for example in inputs:
        loss_of(example).backward()
        for parameter in parameters:
            parameter.grad = None


def reuse(
    loss_of: CausalLoss,
    inputs: list[Inputs],
    schedule: list[Reuse],
    parameters: list[nn.Parameter],
    optimizer: Adam,
    clock: Clock,
) -> list[float]:
    """Finetune in place; the losses. Gradients are None before and after."""
    losses = []
    for example, num_steps in schedule:
        losses.append(_pass(loss_of, inputs[example], example, parameters))
        clock.lap("passes")
        optimizer.step(num_steps=num_steps)
        optimizer.zero_grad(set_to_none=True)
        clock.lap("updates")
    return losses


def accumulate(
    loss_of: CausalLoss,
    inputs: list[Inputs],
    schedule: list[Reuse],
    parameters: list[nn.Parameter],
    optimizer: Adam,
    clock: Clock,
) -> list[float]:
    """The same with one update, of the count-weighted mean gradient."""
    total = sum(burst.num_steps for burst in schedule)
    sums: dict[Tensor, Tensor] = {}  # of the parameters that had a gradient
    losses = []
    for example, count in schedule:
        losses.append(_pass(loss_of, inputs[example], example, parameters))
        clock.lap("passes")
        grads = {p: p.grad for p in parameters if p.grad is not None}
        for parameter in grads.keys() - sums.keys():
            sums[parameter] = torch.zeros_like(parameter, dtype=torch.float32)
        accumulate_([sums[p] for p in grads], list(grads.values()), count / total)
        del grads
        optimizer.zero_grad(set_to_none=True)
        clock.lap("updates")
    optimizer.step_with(sums)
    clock.lap("updates")
    return losses


def _pass(
    loss_of: CausalLoss, inputs: Inputs, example: int, parameters: list[nn.Parameter]
) -> float:
    """Forward and backward, gradients into .grad; the loss. Both must be finite."""
    loss = loss_of(inputs)
    loss.backward()
    value = loss.item()
    check_finite(f"loss of examples[{example}]", value)
    grads = [p.grad for p in parameters if p.grad is not None and p.grad.numel() > 0]
    if not math.isfinite(_largest(torch._foreach_norm(grads, 2))):
        # Or a square overflowed: the maximum norm knows, which takes a CPU eight times as long.
        largest = _largest(torch._foreach_norm(grads, math.inf))
        check_finite(f"largest gradient entry of examples[{example}]", largest)
    return value


def _largest(norms: Sequence[Tensor]) -> float:
    """NaN if there is one."""
    return torch.stack(list(norms)).max().item()
