# SPDX-License-Identifier: Apache-2.0
"""The proof that a module is a gated layer of a transformer: down(act(gate(x)) * up(x))."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch
from torch import nn

from .._tensors import HALVES
from .fused_functions import ACTIVATIONS
from .trials import column, random_linear, random_tensor, trial

_IN, _INNER = 5, 7  # columns of a proof
_SIZES = (1e-3, 0.1, 1.0, 1.0, 1.0, 10.0, 1e3)  # of its rows: a clip or a scale shows


class GatedLayer(NamedTuple):
    """The names of a gated layer's parts, and which of ACTIVATIONS `act` computes."""

    gate: str
    up: str
    down: str
    act: str
    activation: str


def gate_parts(module: nn.Module) -> tuple[list[str], list[str]]:
    """The names of the three linear parts and of the activation; empty where a module has others.

    A linear part has `in_features` and `out_features`, as adapters around linear layers have too.
    """
    parts = module._modules
    linear = [
        name
        for name, part in parts.items()
        if hasattr(part, "in_features") and hasattr(part, "out_features")
    ]
    others = [name for name in parts if name not in linear]
    if len(linear) != 3 or len(others) != 1 or module._parameters or module._buffers:
        return [], []
    return linear, others


def proven_gated_layer(module: Any) -> GatedLayer | None:
    """The names with which a module computes the formula; None if it was not found to.

    The module's own forward is tried with small random layers in the places of its linear parts.
    """
    linear, others = gate_parts(module)
    if not linear or not _keeps_halves(module._modules[others[0]]):
        return None
    sizes = {name: _size(module._modules[name]) for name in linear}
    downs = [name for name in linear if list(sizes.values()).count(sizes[name]) == 1]
    if len(downs) != 1:
        return None
    [down], [act] = downs, others
    first, second = (name for name in linear if name != down)
    if sizes[down] != sizes[first][::-1]:
        return None
    random = torch.Generator(device="cpu").manual_seed(0)
    x = random_tensor(random, len(_SIZES), _IN) * column(_SIZES)
    layers = {name: random_linear(_IN, _INNER, random) for name in (first, second)}
    layers[down] = random_linear(_INNER, _IN, random)
    tried = trial(module, x, layers)
    if tried is None or tried.y.shape != x.shape:
        return None
    x = tried.leaves[0]
    for (gate, up), name in product(((first, second), (second, first)), ACTIVATIONS):
        inner = ACTIVATIONS[name](layers[gate](x)) * layers[up](x)
        wanted = layers[down](inner)
        # Each of the few steps and sums rounds once; orders may differ.
        size = inner.detach().abs() @ layers[down].weight.detach().abs().t()
        bound = 64.0 * torch.finfo(x.dtype).eps * size
        if bool(((tried.y - wanted).abs() <= bound).all()):
            same = tried.has_gradients_of(wanted, 1e-3)
            return GatedLayer(gate, up, down, act, name) if same else None
    return None


def _keeps_halves(act: Any) -> bool:
    """Whether an activation without parameters returns halves for halves, as the kernel does."""
    if act is None or next(act.parameters(), None) is not None:
        return False
    halves = [torch.zeros(1, 1, dtype=kind, device="cpu") for kind in HALVES]
    return all(trial(act, x, writes=True) is not None for x in halves)


def _size(part: Any) -> tuple[int, int]:
    return (part.in_features, part.out_features)
