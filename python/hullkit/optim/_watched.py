# SPDX-License-Identifier: Apache-2.0
"""Who looks on while an optimizer steps: hooks, the profiler, schedulers, torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar, cast

import torch

from ..native.torch_private import profiler_enabled, step_hooks

Function = TypeVar("Function", bound=Callable[..., Any])
_pre_hooks, _post_hooks = step_hooks or ({}, {})


def untraced(function: Function) -> Function:
    """torch.compile leaves this function to Python: it takes addresses, and a tensor that is only
    traced has none.

    torch.compiler.disable would do so for every call, at the price of a tenth of a step.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return cast(Function, call)


def watched(optimizer: Any) -> bool:
    """Whether anybody wants to know of a step."""
    return bool(
        profiler_enabled()
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _pre_hooks
        or _post_hooks
        or step_hooks is None
    )


def before_step(optimizer: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Runs pre-step hooks of a step that is no call; the arguments they want."""
    if step_hooks is None:
        return kwargs  # `after_step` has torch run them
    hooks = (_pre_hooks, optimizer._optimizer_step_pre_hooks)
    for hook in chain.from_iterable(list(own.values()) for own in hooks):
        changed = hook(optimizer, (optimizer,), kwargs)
        if changed is not None:
            _, kwargs = changed
    return kwargs


@untraced
def after_step(optimizer: Any, kwargs: dict[str, Any]) -> None:
    optimizer._opt_called = True  # what torch's schedulers look for
    if step_hooks is None:
        torch.optim.Optimizer.profile_hook_step(_no_step)(optimizer, **kwargs)
        return
    hooks = (optimizer._optimizer_step_post_hooks, _post_hooks)
    for hook in chain.from_iterable(list(own.values()) for own in hooks):
        hook(optimizer, (optimizer,), kwargs)


def _no_step(optimizer: Any, **kwargs: Any) -> None:
    """The step is done: torch's wrapper of a step is to run the hooks alone."""
