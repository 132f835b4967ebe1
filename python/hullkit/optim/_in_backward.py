# SPDX-License-Identifier: Apache-2.0
"""A step whose updates run while the backward pass does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .._checks import check_int
from ._layouts import StateLayouts, state_layouts
from ._record import MAX_NUM_STEPS
from ._watched import after_step, before_step, untraced


@contextmanager
def update_in_backward(optimizer: Any, num_steps: int) -> Iterator[None]:
    """See `FusedOptimizer.update_in_backward`."""
    kwargs, block = _begin(optimizer, num_steps)
    try:
        block.register()
        yield
    finally:
        block.end()
    block.check_gradients()
    after_step(optimizer, kwargs)


@untraced
def _begin(optimizer: Any, num_steps: int) -> tuple[dict[str, Any], _Block]:
    """The arguments that hooks of steps see, and the block, begun."""
    num_steps = check_int("num_steps", num_steps, 1, MAX_NUM_STEPS)
    if optimizer.max_grad_norm is not None:
        raise ValueError(
            "max_grad_norm: expected None for an update in backward, got "
            f"{optimizer.max_grad_norm}: the global norm is known only after it"
        )
    groups = {param: group for group in optimizer.param_groups for param in group["params"]}
    left = sum(param.grad is not None for param in groups)
    if left:
        raise ValueError(
            f"params: expected no gradients before an update in backward, got {left}; call "
            "zero_grad() first"
        )
    kwargs = before_step(optimizer, {"num_steps": num_steps})
    num_steps = check_int("num_steps", kwargs.get("num_steps", 1), 1, MAX_NUM_STEPS)
    return kwargs, _Block(optimizer, num_steps, groups)


class _Block:
    """One with-block. What looks at all parameters or all state is done once, not for each update.

    groups: of each parameter to update.
    """

    def __init__(
        self, optimizer: Any, num_steps: int, groups: dict[Tensor, dict[str, Any]]
    ) -> None:
        self._optimizer = optimizer
        self._num_steps = num_steps
        self._groups = groups
        self._done: set[int] = set()
        optimizer._forget_if_replaced()
        optimizer._drop_absent()
        # Code that runs in the block may replace or clear state.
        self._states = {id(param): self._look(param) for param in groups}
        self._hooks: list[Any] = []

    def register(self) -> None:
        """Takes the hooks. One by one, since Ctrl-C may come between two of them."""
        for param in self._groups:
            if param.requires_grad:
                self._hooks.append(param.register_post_accumulate_grad_hook(self._update))

    def _own(self, param: Tensor) -> dict[Any, dict[str, Any]]:
        return {param: self._optimizer.state.get(param, {})}

    def _look(self, param: Tensor) -> StateLayouts:
        return state_layouts(self._own(param))

    def _as_seen(self, param: Tensor) -> bool:
        return self._states[id(param)].unmoved(self._own(param))

    @untraced
    def _update(self, param: Tensor) -> None:
        grad, param.grad = param.grad, None
        if id(param) in self._done:
            raise RuntimeError(
                f"update_in_backward: expected one gradient for each parameter, got a second "
                f"one for a parameter of shape {tuple(param.shape)} (another backward pass, or "
                "reentrant checkpointing)"
            )
        self._done.add(id(param))
        if grad is None:
            raise RuntimeError(
                "update_in_backward: expected the gradient of a parameter of shape "
                f"{tuple(param.shape)} as its hooks run, got None: another hook of the parameter, "
                "or another such block, has taken it"
            )
        optimizer = self._optimizer
        if not self._as_seen(param):
            optimizer._forget()
        launches = optimizer._launches(id(param), self._groups[param], [param], [grad])
        if optimizer._states is None:  # state may have been made
            self._states[id(param)] = self._look(param)
        optimizer._run(launches, self._num_steps)

    def end(self) -> None:
        """Takes the hooks away. Tables made in the block are kept if state is as they have it.

        Otherwise nothing has settled, and the next step or block forgets them.
        """
        for hook in self._hooks:
            hook.remove()
        if self._optimizer._states is None and all(map(self._as_seen, self._groups)):
            self._optimizer._settle()

    def check_gradients(self) -> None:
        """An updated parameter that has a gradient again was updated with another one.

        A second gradient from autograd never gets here: `_update` refuses it and takes it away.
        """
        got = sum(p.grad is not None for p in self._groups if id(p) in self._done)
        if got:
            raise RuntimeError(
                "update_in_backward: expected no gradient on updated parameters at the end of the "
                f"block, got {got}: something set `.grad` after the update, as "
                "DistributedDataParallel does: it sums over ranks only then, so each rank was "
                "updated with its own gradient. Call backward and then step() there"
            )
