# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts without questions to the device.

The experts of transformers loop over those that have tokens, and ask the device which these are.
A CUDA graph cannot record a question.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# What `transformers.integrations.moe.use_experts_implementation` gives to classes of experts.
_MARKS = ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate", "down_proj")


def every_expert(
    experts: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The weighted sum of the chosen experts' outputs, where every expert sees every token.

        y_t = sum over j of w_tj * expert_{i_tj}(x_t)

    Experts that were not chosen have weight 0. With E experts of which k are chosen, the products
    are E / k times those needed, in three kernels whatever the routing.

    hidden [T, d]; top_k_index [T, k] integer; top_k_weights [T, k]. Returns [T, d].
    """
    num_experts = experts.num_experts
    weights = hidden.new_zeros(len(hidden), num_experts, dtype=top_k_weights.dtype)
    weights = weights.scatter_add(1, top_k_index.long(), top_k_weights)  # [T, E]
    x = hidden.expand(num_experts, *hidden.shape)  # [E, T, d]
    if experts.has_gate:
        x = experts._apply_gate(_products(experts, x, "gate_up_proj"))
    else:
        x = experts.act_fn(_products(experts, x, "up_proj"))
    x = _products(experts, x, "down_proj")
    if getattr(experts, "has_post_expert_norm", False):
        x = experts.post_expert_norm(x)
    return (x * weights.t()[:, :, None]).sum(0).to(hidden.dtype)


def _products(experts: Any, x: Tensor, name: str) -> Tensor:
    """x [E, T, a] times each expert's matrix, plus its bias: [E, T, b]."""
    matrices = getattr(experts, name)
    y = torch.bmm(x, matrices if experts.is_transposed else matrices.transpose(1, 2))
    return y + getattr(experts, f"{name}_bias")[:, None] if experts.has_bias else y


@contextmanager
def without_questions(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """Inside the block the model's experts run as `every_expert`. What others replaced stays.

    The block gets the names of the replaced methods, sorted and each once.
    """
    replaced: list[nn.Module] = []
    names: set[str] = set()
    try:
        for module in model.modules():
            if "forward" in module.__dict__ or not _has_known_experts(module):
                continue
            kind = type(module)
            names.add(f"{kind.__module__}.{kind.__qualname__}.forward")
            replaced.append(module)
            module.__dict__["forward"] = partial(every_expert, module)
        yield tuple(sorted(names))
    finally:
        for module in replaced:
            module.__dict__.pop("forward", None)


def _has_known_experts(module: Any) -> bool:
    return (
        all(hasattr(module, name) for name in _MARKS)
        and not getattr(module, "_is_expert_parallel", False)
        and hasattr(module, "gate_up_proj" if module.has_gate else "up_proj")
        and module.down_proj.ndim == 3
        and len(module.down_proj) == module.num_experts
    )
