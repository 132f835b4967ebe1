# SPDX-License-Identifier: Apache-2.0
"""Adam, SGD and accumulation, one tensor at a time."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def adam(
    param: ArrayLike,
    grad: ArrayLike,
    exp_avg: ArrayLike,
    exp_avg_sq: ArrayLike,
    step: float,
    *,
    num_steps: int = 1,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
) -> tuple[Array, Array, Array, float]:
    """num_steps updates with one gradient.

    Args:
        param, grad, exp_avg, exp_avg_sq: arrays of one shape, computed in float64. None is written.
        step: updates made before, >= 0.
        num_steps: updates to make.
        lr, betas, eps, weight_decay, maximize: as in `torch.optim.Adam`.
        decoupled: AdamW's weight decay.
    Returns:
        param, exp_avg, exp_avg_sq (float64) and step, a float, afterwards.

    >>> import numpy as np, hullkit.reference as reference
    >>> zeros = np.zeros(2)
    >>> param, _, _, step = reference.adam(zeros, np.ones(2), zeros, zeros, 0, lr=0.1)
    >>> param.round(3).tolist(), step
    ([-0.1, -0.1], 1.0)
    """
    p, m, v = (np.array(x, dtype=np.float64) for x in (param, exp_avg, exp_avg_sq))
    g = np.asarray(grad, dtype=np.float64) * (-1.0 if maximize else 1.0)
    beta1, beta2 = betas
    step = float(step)  # += would write into an array of the caller's
    for _ in range(num_steps):
        step += 1
        if decoupled:
            p *= 1.0 - lr * weight_decay
        total = g if decoupled else g + weight_decay * p
        m = beta1 * m + (1.0 - beta1) * total
        v = beta2 * v + (1.0 - beta2) * total**2
        p -= lr * (m / (1.0 - beta1**step)) / (np.sqrt(v / (1.0 - beta2**step)) + eps)
    return p, m, v, step


def sgd(
    param: ArrayLike,
    grad: ArrayLike,
    momentum_buffer: ArrayLike | None,
    *,
    num_steps: int = 1,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> tuple[Array, Array | None]:
    """num_steps updates with one gradient.

    Args:
        param, grad, momentum_buffer: arrays of one shape, computed in float64. None is written. The
            buffer is None before the first update.
        num_steps: updates to make.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in `torch.optim.SGD`.
    Returns:
        param and momentum_buffer (float64) afterwards.

    >>> import numpy as np, hullkit.reference as reference
    >>> param, _ = reference.sgd(np.ones(2), np.ones(2), None, num_steps=2, lr=0.1)
    >>> param.round(3).tolist()
    [0.8, 0.8]
    """
    p = np.array(param, dtype=np.float64)
    g = np.asarray(grad, dtype=np.float64) * (-1.0 if maximize else 1.0)
    b = None if momentum_buffer is None else np.array(momentum_buffer, dtype=np.float64)
    for _ in range(num_steps):
        total = g + weight_decay * p
        if momentum:
            b = total if b is None else momentum * b + (1.0 - dampening) * total
            total = total + momentum * b if nesterov else b
        p = p - lr * total
    return p, b


def accumulate(into: ArrayLike, grad: ArrayLike, weight: float) -> Array:
    """into + weight * grad

    Args:
        into, grad: arrays of one shape.
        weight: a number.
    Returns:
        A new float64 array.

    >>> import numpy as np, hullkit.reference as reference
    >>> reference.accumulate(np.ones(2), np.ones(2), 0.5).tolist()
    [1.5, 1.5]
    """
    return np.asarray(into, dtype=np.float64) + weight * np.asarray(grad, dtype=np.float64)


def global_norm(grads: list[ArrayLike]) -> float:
    """2-norm of all elements of all gradients.

    Args:
        grads: arrays of any shapes.
    Returns:
        The norm, summed in float64.

    >>> import numpy as np, hullkit.reference as reference
    >>> reference.global_norm([np.array([3.0]), np.array([4.0])])
    5.0
    """
    return math.sqrt(sum(float(np.sum(np.asarray(g, dtype=np.float64) ** 2)) for g in grads))
