# SPDX-License-Identifier: Apache-2.0
"""Writes to parameters without `requires_grad`, of which a query keeps no copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn


def check_rescaled(model: nn.Module) -> None:
    """Refuses an RWKV model whose next pass in eval mode would write to frozen weights.

    Its first such pass divides them by powers of two, and its first pass in training mode takes
    that back. An attribute tells which came last, and a query restores attributes.
    """
    for name, module in model.named_modules():
        if vars(module).get("layers_are_rescaled") is not False:
            continue
        every = getattr(getattr(module, "config", None), "rescale_every", 0)
        if every > 0 and not all(p.requires_grad for p in module.parameters()):
            raise ValueError(
                "model: expected weights as RWKV has them in eval mode, got ones that its first "
                f"pass there would rescale, some of them without requires_grad: {name!r}. Call "
                "model.eval() and run the model once before"
            )


def check_unwritten(model: nn.Module, written: list[Tensor]) -> None:
    """Raises RuntimeError for the first of parameters that were written to."""
    if not written:
        return
    raise RuntimeError(
        "adapted(): expected nobody to write to parameters without requires_grad, got "
        + of_write(model, written[0])
    )


def of_write(model: nn.Module, parameter: Tensor) -> str:
    """What an error says of a write to this parameter, of which there is no copy."""
    names = [repr(name) for name, present in model.named_parameters() if present is parameter]
    return (
        f"a write to {', '.join(names)} of shape {tuple(parameter.shape)}. There is no copy of it, "
        "so the base model is changed: load it again"
    )


def forbid_merging(modules: Iterable[nn.Module], adapted: Callable[[nn.Module], bool]) -> None:
    """Lets PEFT's layers refuse to merge adapters into frozen weights.

    It sets attributes of modules, which the query's snapshot takes away again.

    adapted: whether a module is inside a block. A copy of one is not.
    """
    for module in modules:
        if "merged_adapters" in vars(module):
            for name in ("merge", "unmerge"):
                if callable(getattr(module, name, None)):
                    # Copies and pickles of the module have this attribute, too.
                    vars(module)[name] = partial(_merge_or_refuse, adapted, module, name)


def _merge_or_refuse(
    adapted: Callable[[nn.Module], bool], module: nn.Module, name: str, *args: Any, **kwargs: Any
) -> Any:
    if adapted(module):
        raise RuntimeError(
            f"{name}: expected frozen weights that an adapted() block only reads, for there is no "
            "copy of them, got adapters to merge or unmerge; do it in copy.deepcopy(model)"
        )
    return getattr(type(module), name)(module, *args, **kwargs)
