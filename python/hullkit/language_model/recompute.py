# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing in eval mode: models of transformers do it in training mode only."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

# The class is known by its name, so transformers is never imported.
_LAYER = "transformers.modeling_layers.GradientCheckpointingLayer"
_FUNCTION = "_gradient_checkpointing_func"
REPLACED = f"{_LAYER}.{_FUNCTION}"  # the name under which reports list it

# Layers that drew random numbers on a CUDA device when they ran last.
_RANDOM: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextmanager
def same_random_numbers(layer: nn.Module) -> Iterator[bool]:
    """A block for a layer's checkpoint; the value is for its `preserve_rng_state`.

    A capture does not allow reading the state of random numbers. So a layer that drew some in the
    pass before is refused there.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        if layer in _RANDOM:
            raise RuntimeError(
                f"{type(layer).__name__} draws random numbers and runs again in the backward pass"
            )
        yield False
        return
    generators = torch.cuda.default_generators
    before = [generator.get_offset() for generator in generators]
    yield True
    if before == [generator.get_offset() for generator in generators]:
        _RANDOM.discard(layer)
    else:
        _RANDOM.add(layer)


def checkpointed_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that keep only their input and are computed again in the backward pass."""
    on = [m for m in model.modules() if m.__dict__.get("gradient_checkpointing")]
    layers = [
        module
        for module in on
        if _FUNCTION in module.__dict__
        and any(f"{c.__module__}.{c.__qualname__}" == _LAYER for c in type(module).__mro__)
    ]
    if on and not layers:
        warnings.warn(
            "hullkit: gradient checkpointing has no effect: passes run in eval mode, where "
            f"{type(model).__name__} does without (its layers are no {_LAYER})",
            stacklevel=2,
        )
    return layers


@contextmanager
def checkpointing(layers: list[nn.Module]) -> Iterator[None]:
    """Inside the block these layers checkpoint. Their parts stay in eval mode, without dropout."""
    replaced: list[tuple[Any, Any, bool]] = []
    try:
        for layer in layers:
            own: Any = layer.__dict__[_FUNCTION]
            replaced.append((layer, own, layer.training))
            layer.__dict__[_FUNCTION] = _InEvalMode(layer, own)
            layer.training = True
        yield
    finally:
        for layer, own, training in replaced:
            layer.__dict__[_FUNCTION] = own
            layer.training = training


class _InEvalMode:
    """A `checkpoint` whose function finds the layer in eval mode, now and in the backward pass."""

    def __init__(self, layer: nn.Module, checkpoint: Callable[..., Any]) -> None:
        self._layer = layer
        self._checkpoint = checkpoint
        self._is_torchs = (
            getattr(checkpoint, "func", checkpoint) is torch.utils.checkpoint.checkpoint
        )

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        with same_random_numbers(self._layer) as preserved:
            # What somebody has chosen stays, where it can.
            options = {"preserve_rng_state": False} if self._is_torchs and not preserved else {}
            return self._checkpoint(functools.partial(self._run, function), *args, **options)

    def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        before = self._layer.training
        self._layer.training = False
        try:
            return function(*args)
        finally:
            self._layer.training = before
