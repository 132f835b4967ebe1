# SPDX-License-Identifier: Apache-2.0
"""State tensors of an optimizer, in the layout of their parameter."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from .._checks import check_tensor
from .._tensors import same_layout

State = tuple[list[Tensor | None], bool]
StateBefore = list[tuple[Tensor, dict[str, Any] | None]]  # what an optimizer had; None: nothing


def own_values(state: Mapping[Any, dict[str, Any]], param: Tensor) -> list[Any]:
    """What an optimizer's state has of this parameter."""
    return [*state.get(param, {}).values()]


def state_before(state: Mapping[Any, dict[str, Any]], param: Tensor) -> dict[str, Any] | None:
    return dict(state[param]) if param in state else None


def restore_state(state: MutableMapping[Any, dict[str, Any]], before: StateBefore) -> None:
    for param, own in reversed(before):
        if own is None:
            state.pop(param, None)
        else:
            state[param] = own


def are_among(values: list[Any], others: list[Any]) -> bool:
    """Whether each of these objects is one of the others."""
    return set(map(id, values)) <= set(map(id, others))


def state_like(state: dict[str, Any], name: str, param: Tensor, dtype: torch.dtype) -> Tensor:
    """The state tensor of this name in the parameter's layout, made if missing."""
    found = state.get(name)
    if found is None:
        found = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    tensor = check_tensor(f"state[{name!r}]", found)
    if tensor.dtype != dtype or not same_layout(tensor, param):
        if tensor.shape != param.shape:
            raise ValueError(
                f"state[{name!r}]: expected shape {tuple(param.shape)}, got {tuple(tensor.shape)}"
            )
        tensor = torch.empty_like(param, dtype=dtype).copy_(tensor)
    state[name] = tensor = tensor.to(param.device)
    return tensor
