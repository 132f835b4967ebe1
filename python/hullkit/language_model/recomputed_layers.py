# SPDX-License-Identifier: Apache-2.0
"""Layers that keep only their input and run again in the backward pass.

A pass then holds one input for each layer, and the tensors of one layer at a time.
"""

from __future__ import annotations

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
    replaced: list[tuple[nn.Module, bool, Any]] = []
    try:
        for layer in layers:
            own = layer.forward
            replaced.append((layer, "forward" in layer.__dict__, own))
            layer.__dict__["forward"] = _Recomputed(layer, own)
        yield
    finally:
        for layer, had_own, own in replaced:
            if had_own:
                layer.__dict__["forward"] = own
            else:
                layer.__dict__.pop("forward", None)


class _Recomputed:
    """A forward whose inner tensors are computed again in the backward pass."""

    def __init__(self, layer: nn.Module, own: Callable[..., Any]) -> None:
        self._layer = layer
        self._own = own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with same_random_numbers(self._layer) as preserved:
            return torch.utils.checkpoint.checkpoint(
                functools.partial(self._own, **kwargs),
                *args,
                use_reentrant=False,
                preserve_rng_state=preserved,
            )
