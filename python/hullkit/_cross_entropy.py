"""The loss of a causal language model from its logits, fused on CUDA."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _multi_tensor
from .metrics import IGNORED, at_least_float32


def next_token_loss(logits: Tensor, labels: Tensor, *, backend: str | None = None) -> Tensor:
    """Mean of -log softmax(logits[t])[labels[t + 1]] over the t whose label is not -100.

    logits (1, T, V), floating; labels (1, T) int64, one scored at least; [] of float32, or float64
    for such logits. On CUDA one kernel reads the logits, and in the backward pass another writes
    the gradient over them: the logits exist once, in their own dtype. Whoever else saved them for
    the backward pass gets torch's error about a tensor that was changed. backend="triton" runs
    the kernels on CPU tensors too, in the interpreter.
    """
    rows = logits.flatten(0, 1)  # [T, V]; logits[0] would copy the gradient
    if _multi_tensor.uses_triton("logits", logits.device, backend):
        loss: Tensor = _Fused.apply(rows, labels[0])  # type: ignore[no-untyped-call]
        return loss
    shifted = F.pad(labels[0, 1:], (0, 1), value=IGNORED)
    return F.cross_entropy(at_least_float32(rows), shifted, ignore_index=IGNORED)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        labels = labels.contiguous()
        math = _multi_tensor.arithmetic_dtype(logits.dtype)
        losses = torch.zeros(len(labels), dtype=math, device=logits.device)
        normalisers = torch.empty_like(losses)
        _launch("cross_entropy", logits, labels, losses, normalisers)
        count = (labels[1:] != IGNORED).sum()
        ctx.save_for_backward(logits, labels, normalisers, count)
        return losses.sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, labels, normalisers, count = ctx.saved_tensors
        scale = (gradient / count).reshape(1)
        _launch("cross_entropy_gradient", logits, labels, normalisers, scale)
        torch.autograd.graph.increment_version(logits)
        return logits, None


def _launch(name: str, logits: Tensor, *arguments: Tensor) -> None:
    from .triton_kernels.launch import launch

    rows, columns = logits.shape
    sizes = (rows, logits.stride(0), columns)
    math = _multi_tensor.arithmetic_dtype(logits.dtype)
    with torch.cuda.device_of(logits):  # nothing for one on the CPU
        launch(name, rows, (logits, *arguments, *sizes), {"MATH": math})
