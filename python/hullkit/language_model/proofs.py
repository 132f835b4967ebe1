# SPDX-License-Identifier: Apache-2.0
"""What modules compute: formulas that were found by trying a module on random numbers."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import nn

from .fused_functions import proven_activation
from .gated_layers import GatedLayer, gate_parts, proven_gated_layer
from .low_rank import LowRank, is_watched, proven_low_rank
from .norms import Norm, proven_rms_norm
from .trials import LeftSomething, Same, facts, plain_modes

Formula = Norm | LowRank | GatedLayer | str


class _Known(NamedTuple):
    """What a module was found to compute, and the facts on which that rests.

    left: the trials in a row that left something behind.
    """

    facts: Any
    formula: Formula | None
    left: int


_PROOFS: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()
# A module may set itself up in its first forward. One that leaves something in each would be tried
# in every pass, since its attributes have changed each time.
_MOST_LEFT = 2
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # parts, hooks and the like


def proof(module: nn.Module) -> Formula | None:
    """The known formula that a module computes; None if none was found.

    That is an RMS norm, a low-rank adapter beside a linear layer, a gated layer, or the name of an
    activation. It is tried once, and again when an attribute has changed, unless it has left
    something behind in two trials. Random numbers that a trial draws are put back.
    """
    kind = type(module)
    if kind.__module__.startswith("torch.nn."):  # these call functions of torch
        return None
    known = _PROOFS.get(module)
    if known is not None and known.left == _MOST_LEFT:
        return None
    adapted = "lora_A" in module._modules
    _, activations = gate_parts(module)
    parameters = [p for p in module._parameters.values() if p is not None]
    simple = not (module._modules or module._buffers or len(parameters) > 1)
    if not (adapted or activations or simple):
        return None
    found_with: Any = (kind.forward, *((p.dtype, p.shape, p.device) for p in parameters))
    found_with += facts(module, _OF_EVERY_MODULE)
    if adapted:  # its parts, which may be replaced or watched, and whether they train: dropout does
        for part in module.modules():
            own = tuple(name for name, p in part._parameters.items() if p is not None)
            found_with += (Same(part), type(part), part.training, own, is_watched(part))
    acts = [act for name in activations if (act := module._modules[name]) is not None]
    for act in acts:  # the linear parts are called as they are
        found_with += (*module._modules, Same(act), type(act).forward, is_watched(act))
        found_with += facts(act)
    if known is not None and known.facts == found_with:
        return known.formula
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return None  # a forward that is tried might wait for the device
    found, left = None, 0
    try:
        with plain_modes():
            found = _found(module, adapted, acts if activations else None, parameters)
    except LeftSomething:
        left = 1 if known is None else known.left + 1
    _PROOFS[module] = _Known(found_with, found, left)
    return found


def _found(
    module: nn.Module,
    adapted: bool,
    acts: list[nn.Module] | None,
    parameters: list[nn.Parameter],
) -> Formula | None:
    """acts: the activations of what may be a gated layer."""
    if adapted:
        return proven_low_rank(module)
    if acts is not None:
        return None if any(map(is_watched, acts)) else proven_gated_layer(module)
    if parameters:
        return proven_rms_norm(module, parameters[0].dtype)
    return proven_activation(module, torch.float32, torch.device("cpu"))
