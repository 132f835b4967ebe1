# SPDX-License-Identifier: Apache-2.0
"""act(gate) * up in one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up for two contiguous tensors of one shape and dtype.

    activation: "silu", "gelu_tanh" or "gelu".
    """
    result: Tensor = _Gated.apply(gate, up, activation)  # type: ignore[no-untyped-call]
    return result


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        out = torch.empty_like(gate)
        _launch("gate", gate, (gate, up, out), activation)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        tensors = (gate, up, gradient.contiguous(), of_gate, of_up)
        _launch("gate_gradient", gate, tensors, ctx.activation)
        return of_gate, of_up, None


def _launch(name: str, like: Tensor, tensors: tuple[Tensor, ...], activation: str) -> None:
    from ..triton_kernels.gate import BLOCK_SIZE
    from ..triton_kernels.launch import launch

    programs = -(-like.numel() // BLOCK_SIZE)
    with torch.cuda.device_of(like):
        launch(name, programs, (*tensors, like.numel()), {"KIND": activation})
