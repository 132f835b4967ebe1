# SPDX-License-Identifier: Apache-2.0
"""The loss of a causal language model, from its logits or from its last layer's input.

On CUDA tensors it is computed by fused kernels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._tensors import uses_triton
from ..optim import _kernels
from .interface import IGNORED, at_least_float32
from .products import add_product, widens

# Logits of so many bytes at a time (416 tokens of GPT-2 in float32), or CHUNK_ROWS tokens if they
# are more and take no more than MOST_CHUNK_BYTES: products of few rows are slower (H100).
CHUNK_BYTES, CHUNK_ROWS, MOST_CHUNK_BYTES = 80 << 20, 2048, 256 << 20
_ALIGNED = 64  # a row of logits begins at a multiple of so many elements
_TENSOR_CORES = 8  # tensor cores are fast where a matrix's sides are multiples of this


def next_token_loss(logits: Tensor, labels: Tensor, *, backend: str | None = None) -> Tensor:
    """Mean of -log softmax(logits[t])[labels[t + 1]] over the t whose label is not -100.

    On CUDA one kernel reads the logits. In the backward pass another one writes the gradient over
    them, so the logits exist once, in their own dtype. If another function saved them for its
    backward pass, torch raises its error about a tensor that was changed.

    Args:
        logits: (1, T, V), floating.
        labels: (1, T) int64, at least one of them scored.
        backend: "triton" runs the kernels on CPU tensors too, in Triton's interpreter.
    Returns:
        A 0-d float32 tensor; float64 for float64 logits.
    """
    return next_token_losses(logits, labels, backend=backend)[0]


def next_token_losses(
    logits: Tensor, labels: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The sum over K sequences of their `next_token_loss`, and each one's, without gradient.

    logits (K, T, V), labels (K, T). The loss of a sequence without a scored token is 0.
    """
    if uses_triton("logits", logits.device, backend):
        rows = logits.flatten(0, 1)  # [K T, V]; logits[0] would copy the gradient
        saved = _is_saved_result(logits)
        both: tuple[Tensor, Tensor] = _Fused.apply(rows, _targets(labels), saved)  # type: ignore[no-untyped-call]
        return both
    rows = at_least_float32(logits.flatten(0, 1))
    targets = _targets(labels)
    losses = F.cross_entropy(rows, targets.flatten(), ignore_index=IGNORED, reduction="none")
    means = (losses.view(targets.shape) * _shares(targets, losses.dtype)).sum(1)
    return means.sum(), means.detach()


def plain_next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """`next_token_loss` by torch alone, on any device. Logits stay as they are."""
    rows = at_least_float32(logits.flatten(0, 1))
    return F.cross_entropy(rows, _targets(labels).flatten(), ignore_index=IGNORED)


class TiedGradient:
    """The gradient of a matrix that is both the embedding and the last layer.

    The last layer's backward pass leaves its gradient here, and the embedding's adds to it in
    place. Autograd itself would make two more matrices.
    """

    def __init__(self) -> None:
        self.taken: Tensor | None = None

    def embedding(self, ids: Tensor, weight: Tensor) -> Tensor:
        """F.embedding(ids, weight)."""
        rows: Tensor = _Embedding.apply(weight, ids, self)  # type: ignore[no-untyped-call]
        return rows


def linear_next_token_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    tied: TiedGradient | None = None,
    copy: Tensor | None = None,
) -> Tensor:
    """`next_token_loss(F.linear(hidden, weight), labels)` without all logits in memory.

    Triton's kernels compute it chunk by chunk. A chunk's logits give the loss and, at once, both
    gradients, which are kept for the backward pass in place of the logits.

    Args:
        hidden: (1, T, D). Products are in autocast's dtype where that is on.
        weight: (V, D).
        labels: (1, T) int64, at least one of them scored.
        tied: the object whose `embedding` looks up rows of the same weight.
        copy: the weight in the products' dtype, if there is one already.
    """
    return linear_next_token_losses(hidden, weight, labels, tied, copy)[0]


def linear_next_token_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    tied: TiedGradient | None = None,
    copy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`next_token_losses(F.linear(hidden, weight), labels)` without all logits in memory.

    hidden (K, T, D), labels (K, T); the other arguments as in `linear_next_token_loss`.
    """
    arguments = (hidden.flatten(0, 1), weight, _targets(labels), tied, copy)
    both: tuple[Tensor, Tensor] = _FusedLinear.apply(*arguments)  # type: ignore[no-untyped-call]
    return both


def _is_saved_result(tensor: Tensor) -> bool:
    """Whether the function that made a tensor, or that of which it is a view, keeps its result."""
    node = (tensor if tensor._base is None else tensor._base).grad_fn
    return node is not None and "_saved_result" in dir(node)


def _targets(labels: Tensor) -> Tensor:
    """The label that each position predicts (K, T); -100 for the last positions."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def _shares(targets: Tensor, dtype: torch.dtype) -> Tensor:
    """(K, 1): what a scored position weighs in the mean of its sequence."""
    count = (targets != IGNORED).sum(1, keepdim=True)
    return count.clamp(min=1).to(dtype).reciprocal()


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, saved: bool) -> tuple[Tensor, Tensor]:
        ctx.saved = saved
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        losses, normalisers, shares = _row_results(logits.dtype, targets)
        _launch("cross_entropy", logits, targets, losses, normalisers, GRADIENT=False)
        ctx.save_for_backward(logits, targets, normalisers, shares)
        return _means(ctx, losses, shares)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, normalisers, shares = ctx.saved_tensors
        logits = logits.clone() if ctx.saved else logits
        scale = shares * gradient
        _launch("cross_entropy_gradient", logits, targets, normalisers, scale)
        torch.autograd.graph.increment_version(logits)
        return logits, None, None


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        tied: TiedGradient | None,
        copy: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        kind = hidden.device.type
        cast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if cast else hidden.dtype
        wide = weight.dtype if widens(hidden) else dtype
        product = copy if copy is not None and copy.dtype is dtype else weight.to(dtype)
        with torch.autocast(kind, enabled=False):
            losses, shares, d_hidden, d_weight = _of_chunks(
                hidden.to(dtype), product, targets, wide, *ctx.needs_input_grad[:2]
            )
        ctx.gradients = (
            None if d_hidden is None else d_hidden.to(hidden.dtype),
            None if d_weight is None else d_weight.to(weight.dtype),
        )
        ctx.tied = tied
        return _means(ctx, losses, shares)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: Tensor, _: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        d_hidden, d_weight = ctx.gradients
        ctx.gradients = None  # autograd copies a gradient that has another reference
        for computed in (d_hidden, d_weight):
            if computed is not None:
                _rescale(computed, gradient.reshape(1))
        if ctx.tied is not None:
            ctx.tied.taken = d_weight
        return d_hidden, d_weight, None, None, None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, tied: TiedGradient) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.num_rows, ctx.tied = len(weight), tied
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        (ids,) = ctx.saved_tensors
        taken, ctx.tied.taken = ctx.tied.taken, None
        if taken is None:  # the last layer took no part, or another lookup has used its gradient
            dense = torch.ops.aten.embedding_dense_backward(gradient, ids, ctx.num_rows, -1, False)
            return dense, None, None
        # Sums have the same order in every run, unlike those of index_add_.
        taken.index_put_((ids.flatten(),), gradient.flatten(0, -2), accumulate=True)
        return None, None, None


def _of_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    wide: torch.dtype,
    of_hidden: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Losses and their shares (K, T), and gradients by hidden (K T, D) and weight (V, D).

    targets: (K, T). wide: dtype of the weight's gradient. Gradients are made where wanted.
    """
    length, columns = len(hidden), len(weight)
    stride = -(-columns // _ALIGNED) * _ALIGNED
    step = -(-length // -(-length // _rows_at_once(stride * hidden.itemsize)))
    losses, normalisers, shares = _row_results(hidden.dtype, targets)
    gradient = of_hidden or of_weight
    kernel, of_rows = (
        ("cross_entropy_and_gradient", shares) if gradient else ("cross_entropy", normalisers)
    )
    flat = [t.flatten() for t in (targets, losses, of_rows)]
    d_hidden = torch.empty_like(hidden) if of_hidden else None
    # This outlives the logits, so it is allocated before them.
    d_weight = torch.empty_like(weight, dtype=wide) if of_weight else None
    memory = hidden.new_empty(step, stride)
    for first in range(0, length, step):
        rows = slice(first, min(first + step, length))
        x = hidden[rows]
        logits = memory[: len(x), :columns]
        for part in _parts(columns):
            torch.mm(x, weight[part].t(), out=logits[:, part])
        _launch(kernel, logits, *(t[rows] for t in flat), GRADIENT=gradient)
        if not gradient:
            continue
        for part in _parts(columns):
            if d_hidden is not None:
                beta = int(part.start > 0)
                d_hidden[rows].addmm_(logits[:, part], weight[part], beta=beta)
            if d_weight is not None:
                add_product(d_weight[part], logits[:, part].t(), x, fresh=first == 0)
    return losses, shares, d_hidden, d_weight


def _rows_at_once(row_bytes: int) -> int:
    few, most = CHUNK_BYTES // row_bytes, MOST_CHUNK_BYTES // row_bytes
    return max(1, few, min(most, CHUNK_ROWS))


def _parts(columns: int) -> list[slice]:
    """The columns in two parts: as many as tensor cores take, and the few others.

    With 50257 columns in bfloat16 that is four times as fast as one product (H100).
    """
    most = columns // _TENSOR_CORES * _TENSOR_CORES
    return [part for part in (slice(0, most), slice(most, columns)) if part.start < part.stop]


def _row_results(dtype: torch.dtype, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for each row's loss and normaliser, and each row's share in its mean; all (K, T)."""
    math = _kernels.arithmetic_dtype(dtype)
    losses = torch.zeros(targets.shape, dtype=math, device=targets.device)
    return losses, torch.empty_like(losses), _shares(targets, math).expand_as(losses).contiguous()


def _means(ctx: Any, losses: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of all sequences' means, and each one's, which has no gradient."""
    means = (losses * shares).sum(1)
    ctx.mark_non_differentiable(means)
    return means.sum(), means


def _launch(name: str, logits: Tensor, *arguments: Tensor, **flags: bool) -> None:
    from ..triton_kernels.launch import launch

    math = _kernels.arithmetic_dtype(logits.dtype)
    sizes = (logits.stride(0), logits.shape[1])
    with torch.cuda.device_of(logits):  # does nothing for a CPU tensor
        launch(name, len(logits), (logits, *arguments, *sizes), {"MATH": math} | flags)


def _rescale(values: Tensor, scale: Tensor) -> None:
    """values *= scale, in one launch; scale (1,)."""
    from ..triton_kernels.cross_entropy import BLOCK_SIZE
    from ..triton_kernels.launch import launch

    programs = min(1024, -(-values.numel() // BLOCK_SIZE))
    with torch.cuda.device_of(values):
        launch("rescale", programs, (values, scale, values.numel()), {})
