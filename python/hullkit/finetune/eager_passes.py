# SPDX-License-Identifier: Apache-2.0
"""Eager passes and updates, one by one, on any device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from ..language_model.loss import CausalLoss, check_depends
from ..language_model.pass_copies import PassCopies
from ..native.torch_private import foreach_norm
from ..optim import accumulate_
from .activations import ActivationPlan
from .padding import Inputs
from .report import Clock
from .rounding import Rounding, RoundingAdam
from .schedule import Reuse


def check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(f"{name}: expected a finite number, got {value}")


def compile_passes(
    loss_of: CausalLoss, inputs: list[Inputs], parameters: list[nn.Parameter]
) -> None:
    """Runs a pass of each example, so that everything is compiled. Nothing is updated."""
    for i, example in enumerate(inputs):
        _backward(loss_of, example, f"lengths[{i}]")
        for parameter in parameters:
            parameter.grad = None


class Trained:
    """The trained parameters of a query and their optimizer.

    Passes may read copies of some parameters; the optimizer updates the parameters' own values.
    Objects are made and used inside `copies.in_place()`.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        copies: PassCopies,
        rounding: Rounding,
        **options: Any,
    ) -> None:
        self.parameters = parameters
        self._copies = copies
        # A parameter with a copy has the copy's dtype here, so its own values are another tensor.
        tensors = [p if copies.of(p) is None else copies.data_of(p) for p in parameters]
        self._own = dict(zip(parameters, tensors, strict=True))
        self._optimizer = RoundingAdam(tensors, parameters, rounding, **options)
        self.num_updates = 0

    def step_with(self, grads: dict[nn.Parameter, Tensor], num_steps: int) -> None:
        self._optimizer.step_with({self._own[p]: g for p, g in grads.items()}, num_steps=num_steps)
        self._copies.refresh(grads)
        if grads:  # hooks of the user's may have taken all
            self.num_updates += num_steps

    def gradients(self) -> dict[nn.Parameter, Tensor]:
        return {p: p.grad for p in self.parameters if p.grad is not None}

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def reset(self) -> None:
        self._optimizer.reset()


def reuse(
    loss_of: CausalLoss,
    inputs: list[Inputs],
    schedule: list[Reuse],
    trained: Trained,
    plan: ActivationPlan,
    clock: Clock,
) -> list[float]:
    """Finetunes in place, burst by burst, and returns the losses. Gradients are None before and
    after."""
    losses = []
    for example, num_steps in schedule:
        losses.append(_pass(loss_of, inputs[example], example, trained, plan))
        clock.lap("passes")
        trained.step_with(trained.gradients(), num_steps)
        trained.zero_grad()
        clock.lap("updates")
    return losses


def accumulate(
    loss_of: CausalLoss,
    inputs: list[Inputs],
    schedule: list[Reuse],
    trained: Trained,
    plan: ActivationPlan,
    clock: Clock,
) -> list[float]:
    """Finetunes in place by one update with the mean gradient of the multiset; see `reuse`."""
    total = sum(burst.num_steps for burst in schedule)
    sums: dict[nn.Parameter, Tensor] = {}  # only for parameters that had a gradient
    losses = []
    for example, count in schedule:
        losses.append(_pass(loss_of, inputs[example], example, trained, plan))
        clock.lap("passes")
        grads = trained.gradients()
        for parameter in grads.keys() - sums.keys():
            sums[parameter] = torch.zeros_like(parameter, dtype=torch.float32)
        for dtype in {grad.dtype for grad in grads.values()}:
            alike = [p for p, grad in grads.items() if grad.dtype is dtype]
            accumulate_([sums[p] for p in alike], [grads[p] for p in alike], count / total)
        del grads
        trained.zero_grad()
        clock.lap("updates")
    trained.step_with(sums, 1)
    clock.lap("updates")
    return losses


def _pass(
    loss_of: CausalLoss, inputs: Inputs, example: int, trained: Trained, plan: ActivationPlan
) -> float:
    """Runs forward and backward; returns the loss. Loss and gradients must be finite."""
    value, name = None, f"examples[{example}]"
    if trained.parameters[0].is_cuda and plan.may_recompute(inputs):
        try:
            value = _backward(loss_of, inputs, name, recompute=False)
        except torch.OutOfMemoryError:  # here its frames still hold tensors of the pass
            plan.note_too_large(inputs)
            trained.zero_grad()
    if value is None:
        value = _backward(loss_of, inputs, name, recompute=plan.recomputes(inputs))
    check_finite(f"loss of {name}", value)
    gradients = trained.gradients().values()
    for gradient in gradients:
        if gradient.layout is not torch.strided:  # of functional.embedding(sparse=True), say
            raise ValueError(
                f"model: expected dense gradients, got {gradient.layout} for a parameter of shape "
                f"{tuple(gradient.shape)} from {name}"
            )
    grads = [gradient for gradient in gradients if gradient.numel() > 0]
    if grads and not math.isfinite(_largest(foreach_norm(grads, 2))):
        # A square may have overflowed. The maximum norm tells, but takes a CPU eight times as long.
        largest = _largest(foreach_norm(grads, math.inf))
        check_finite(f"largest gradient entry of {name}", largest)
    return value


def _backward(loss_of: CausalLoss, inputs: Inputs, name: str, *, recompute: bool = False) -> float:
    loss = loss_of(inputs, recompute=recompute)
    check_depends(name, loss)
    try:
        loss.backward()
    except CheckpointError as error:
        if recompute or not loss_of.fused:  # the fault may be another one
            raise
        raise RuntimeError(
            "model: its forward calls torch.utils.checkpoint, which runs parts again without the "
            "fused functions of the pass; give fuse=False"
        ) from error
    return loss.item()


def _largest(norms: Sequence[Tensor]) -> float:
    """The largest number; NaN if one of them is."""
    return torch.stack(list(norms)).max().item()
