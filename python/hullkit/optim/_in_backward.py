# SPDX-License-Identifier: Apache-2.0
"""A step whose updates run while the backward pass does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

from torch import Tensor

from .._checks import check_int
from ._record import MAX_NUM_STEPS
from ._watched import after_step, before_step, untraced


@contextmanager
def update_in_backward(optimizer: Any, num_steps: int) -> Iterator[None]:
    """See `FusedOptimizer.update_in_backward`."""
    kwargs, hooks = _begin(optimizer, num_steps)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    after_step(optimizer, kwargs)


def _state_of(optimizer: Any, param: Tensor) -> list[Any]:
    return [*optimizer.state.get(param, {}).values()]


@untraced
def _begin(optimizer: Any, num_steps: int) -> tuple[dict[str, Any], list[Any]]:
    """The arguments that hooks of steps see, and handles of the parameters' own hooks."""
    num_steps = check_int("num_steps", num_steps, 1, MAX_NUM_STEPS)
    if optimizer.max_grad_norm is not None:
        raise ValueError(
            "max_grad_norm: expected None for an update in backward, got "
            f"{optimizer.max_grad_norm}: the global norm is known only after it"
        )
    params = {param: group for group in optimizer.param_groups for param in group["params"]}
    left = sum(param.grad is not None for param in params)
    if left:
        raise ValueError(
            f"params: expected no gradients before an update in backward, got {left}; call "
            "zero_grad() first"
        )
    kwargs = before_step(optimizer, {"num_steps": num_steps})
    num_steps = check_int("num_steps", kwargs.get("num_steps", 1), 1, MAX_NUM_STEPS)
    optimizer._forget_if_replaced()
    before = {id(param): _state_of(optimizer, param) for param in params}
    done: set[int] = set()

    @untraced
    def update(param: Tensor) -> None:
        grad, param.grad = param.grad, None
        if id(param) in done:
            raise RuntimeError(
                f"update_in_backward: expected one gradient for each parameter, got a second "
                f"one for a parameter of shape {tuple(param.shape)} (another backward pass, or "
                "reentrant checkpointing)"
            )
        done.add(id(param))
        if grad is None:
            raise RuntimeError(
                "update_in_backward: expected the gradient of a parameter of shape "
                f"{tuple(param.shape)} as its hooks run, got None: another hook of the parameter, "
                "or another such block, has taken it"
            )
        # The block's own code may have replaced or cleared it. To look at all of it would cost each
        # update as much as a step.
        state = _state_of(optimizer, param)
        if len(state) != len(before[id(param)]) or not all(map(is_, state, before[id(param)])):
            optimizer._forget()
        launches = optimizer._launches(id(param), params[param], [param], [grad])
        optimizer._run(launches, num_steps)

    hooks = [
        param.register_post_accumulate_grad_hook(update) for param in params if param.requires_grad
    ]
    return kwargs, hooks
