# SPDX-License-Identifier: Apache-2.0
"""Layers that keep only their input and run again in the backward pass.

A pass then holds one input for each layer, and the tensors of one layer at a time.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.utils.checkpoint
from torch import nn

from .recompute import same_random_numbers


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The members of every outermost `nn.ModuleList` of two or more modules of one class.

    Names do not matter, so any architecture will do. A list within such a member (experts, say)
    belongs to the member.
    """
    found: list[nn.Module] = []
    within: set[nn.Module] = set()
    for module in model.modules():  # a module comes before its parts
        if not isinstance(module, nn.ModuleList) or module in within or len(module) < 2:
            continue
        if len({type(layer) for layer in module}) == 1:
            found.extend(module)
            within.update(part for layer in module for part in layer.modules())
    return list(dict.fromkeys(found))


@contextmanager
def recomputing(layers: list[nn.Module]) -> Iterator[None]:
    """Inside the block these layers keep only their input. Their own forward runs again later."""
    with _replaced([(layer, _Recomputed(layer, layer.forward)) for layer in layers]):
        yield


@contextmanager
def _replaced(forwards: list[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Inside the block these modules have other forwards."""
    replaced: list[tuple[nn.Module, Any]] = []
    try:
        for module, forward in forwards:
            replaced.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in replaced:
            if own is not None:
                module.__dict__["forward"] = own
            else:
                module.__dict__.pop("forward", None)


class _Recomputed:
    """A forward whose inner tensors are computed again in the backward pass."""

    def __init__(self, layer: nn.Module, own: Callable[..., Any]) -> None:
        self._layer = layer
        self._own = own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = _TwoRuns(self._layer, self._own, args, kwargs)
        with same_random_numbers(self._layer) as preserved:
            return torch.utils.checkpoint.checkpoint(
                functools.partial(run, **kwargs),
                *args,
                use_reentrant=False,
                preserve_rng_state=preserved,
            )


class _TwoRuns:
    """A layer's call. The second run finds caches and hooks as the first has found them.

    The first one appends keys and values to a cache, if the call has one: that of learned prefixes.
    PEFT's activated LoRA hands its layers their offsets by hooks that end with the forward half.
    """

    def __init__(
        self, layer: nn.Module, own: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> None:
        self._own = own
        named = (*enumerate(args), *kwargs.items())
        self._caches = {name: _as_now(value) for name, value in named if _is_cache(value)}
        # Those of the layer itself run before its forward.
        hooked = [m for m in layer.modules() if m is not layer and m._forward_pre_hooks]
        self._hooks = [
            (m, m._forward_pre_hooks.copy(), m._forward_pre_hooks_with_kwargs.copy())
            for m in hooked
        ]
        self._ran = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._ran:
            self._ran = True
            return self._own(*args, **kwargs)
        args = tuple(self._caches.get(place, value) for place, value in enumerate(args))
        kwargs = {name: self._caches.get(name, value) for name, value in kwargs.items()}
        with _replaced(list(self._with_lost_hooks())):
            return self._own(*args, **kwargs)

    def _with_lost_hooks(self) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        """Forwards of parts whose hooks are gone, to begin with these hooks."""
        for part, hooks, with_kwargs in self._hooks:
            lost = [key for key in hooks if key not in part._forward_pre_hooks]
            if lost:
                found = [(hooks[key], key in with_kwargs) for key in lost]
                yield part, functools.partial(_behind, part, part.forward, found)


def _behind(
    part: nn.Module,
    own: Callable[..., Any],
    hooks: list[tuple[Any, bool]],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The forward of a part behind hooks, each with whether it takes the named inputs, too."""
    for hook, takes_named in hooks:
        given = hook(part, args, kwargs) if takes_named else hook(part, args)
        if given is None:
            continue
        if takes_named:
            args, kwargs = given
        else:
            args = given if isinstance(given, tuple) else (given,)
    return own(*args, **kwargs)


def _is_cache(value: Any) -> bool:
    """Whether it is a cache of transformers, which is never imported, or a layer's part of one."""
    return any(kind.__module__ == "transformers.cache_utils" for kind in type(value).__mro__)


def _as_now(value: Any) -> Any:
    """A cache with the tensors that this one has now. Appending to one makes it a new tensor."""
    if isinstance(value, list):
        return [_as_now(part) for part in value]
    if not _is_cache(value):
        return value
    cache = copy.copy(value)
    vars(cache).update({name: _as_now(part) for name, part in vars(value).items()})
    return cache
