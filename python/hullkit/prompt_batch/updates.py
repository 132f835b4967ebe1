"""Adam's updates of slots, each with its own number of updates, step counter and learning rate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..optim._tensor_table import uses_triton
from .layers import StackedFactors

_LEAST = 1.1754943508222875e-38  # normal numbers begin there


class SlotUpdates:
    """Updates of stacked factors with gradients that lie in their memory.

    unscale: what gradients are multiplied with first; a power of 2.
    """

    def __init__(
        self, factors: StackedFactors, betas: tuple[float, float], eps: float, unscale: float,
        backend: str | None,
    ) -> None:  # fmt: skip
        self._factors = factors
        self._betas = betas
        self._eps = eps
        self._unscale = unscale
        self._backend = backend

    def control(
        self, num_steps: list[int], done: list[int], lr: list[float], capacity: int
    ) -> Tensor:
        """What `apply_` obeys, (K, 1 + 2 capacity) float32 on the host: for each slot the number of
        updates, then each one's step size and the number added to its root.

        lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) is size m / (sqrt(v) + damping) with
        size = lr root / (1 - b1^t), damping = eps root, root = sqrt(1 - b2^t).
        """
        beta1, beta2 = self._betas
        rows = []
        for steps, before, rate in zip(num_steps, done, lr, strict=True):
            row = [float(steps)]
            for i in range(capacity):
                t = before + i + 1
                root = math.sqrt(1.0 - beta2**t)
                damping = max(self._eps * root, _LEAST if self._eps else 0.0)
                row += [rate * root / (1.0 - beta1**t), damping]
            rows.append(row)
        return torch.tensor(rows)

    def apply_(self, control: Tensor, broken: Tensor) -> None:
        """The updates. broken (K,) int32 is set to 1 where a gradient is not finite.

        Slots without updates are neither read nor written. The torch path reads `control` on the
        host; the kernel reads it on the device, so that a captured launch can be told.
        """
        of = self._factors
        (beta1, beta2), slots = self._betas, len(control)
        capacity = (control.shape[1] - 1) // 2
        if not uses_triton("control", control.device, self._backend):
            for slot, (steps, *coefficients) in enumerate(control.tolist()):
                if steps > 0:
                    self._by_torch(slot, coefficients[: 2 * int(steps)], broken)
            return
        from ..triton_kernels.launch import launch
        from ..triton_kernels.multi_tensor import BLOCK_SIZE
        from ..triton_kernels.stacked_adam import BLOCKS

        with torch.cuda.device_of(of.params):
            launch(
                "stacked_adam", (-(-of.size // (BLOCK_SIZE * BLOCKS)), slots),
                (of.params, of.grads, of.exp_avg, of.exp_avg_sq,
                 of.params if of.copies is None else of.copies, control, broken, of.size, capacity,
                 self._unscale, beta1, 1.0 - beta1, beta2, 1.0 - beta2),
                {"COPY": of.copies is not None},
            )  # fmt: skip

    def _by_torch(self, slot: int, coefficients: list[float], broken: Tensor) -> None:
        of = self._factors
        beta1, beta2 = self._betas
        param, mean, square = (t[slot] for t in (of.params, of.exp_avg, of.exp_avg_sq))
        grad = of.grads[slot] * self._unscale
        if not grad.isfinite().all():
            broken[slot] = 1
        for size, damping in zip(coefficients[::2], coefficients[1::2], strict=True):
            mean.lerp_(grad, 1.0 - beta1)
            square.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
            param.addcdiv_(mean, square.sqrt().add_(damping), value=-size)
        if of.copies is not None:
            of.copies[slot].copy_(param)
