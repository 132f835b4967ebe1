"""Functions that models of transformers write out in many small kernels, in one kernel each.

At the lengths of test-time finetuning such kernels take longer to begin than to run, and each keeps
a tensor for the backward pass: 15 to 23 % of a GPT-2 query in bf16, and half of what a pass holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._cross_entropy import next_token_loss
from .metrics import forward_parameters

Forward = Callable[[Tensor], Tensor]


def _gelu(module: Any) -> Forward:
    return lambda x: F.gelu(x, approximate="tanh")


def _rms_norm(module: Any) -> Forward:
    def forward(x: Tensor) -> Tensor:
        weight = module.weight
        # On a CPU torch takes the same steps; of two dtypes, the result is to have the weight's.
        if not x.is_cuda or x.dtype is not weight.dtype:
            return type(module).forward(module, x)  # type: ignore[no-any-return]
        return F.rms_norm(x, weight.shape, weight, module.variance_epsilon)

    return forward


# By the class's full name, so that transformers need not be there. Only classes that compute
# exactly this: others of a similar name add one to the weight, or clip.
_FORWARDS: dict[str, Callable[[Any], Forward]] = {
    "transformers.activations.NewGELUActivation": _gelu,
} | {
    f"transformers.models.{family}.modeling_{family}.{name}RMSNorm": _rms_norm
    for family, name in (
        ("llama", "Llama"),
        ("mistral", "Mistral"),
        ("qwen2", "Qwen2"),
        ("qwen3", "Qwen3"),
    )
}
_LOSS = "transformers.loss.loss_utils.ForCausalLMLoss"
_REWEIGHTED = ("num_items_in_batch", "shift_labels", "ignore_index")  # what changes that loss


def _causal_lm_loss(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def loss(logits: Tensor, labels: Tensor, *sizes: Any, **options: Any) -> Tensor:
        reweighted = any(options.get(name) is not None for name in _REWEIGHTED)
        # A CPU gains nothing; float64 logits are cut to float32 there, and the numbers stay its.
        if reweighted or not logits.is_cuda or logits.dtype is torch.float64:
            return own(logits, labels, *sizes, **options)
        return next_token_loss(logits, labels)

    return loss


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes the same, cheaper. What somebody else replaced stays."""
    replaced: list[tuple[nn.Module, str]] = []

    def replace(module: Any, name: str, stand_in: Callable[..., Tensor]) -> None:
        replaced.append((module, name))
        setattr(module, name, stand_in)

    try:
        for module in model.modules():
            forward = _FORWARDS.get(_full_name(type(module)))
            if forward is not None and "forward" not in module.__dict__:
                replace(module, "forward", forward(module))
        head = _head(model)
        if head is not None and _full_name(head.loss_function) == _LOSS:
            replace(head, "_loss_function", _causal_lm_loss(head.loss_function))
        yield
    finally:
        for module, name in replaced:
            module.__dict__.pop(name, None)


def _head(model: nn.Module) -> Any:
    """The model of transformers, in whatever is wrapped around it, if its loss is its class's."""
    for module in model.modules():
        if hasattr(type(module), "loss_function") and "labels" in forward_parameters(module):
            return None if "_loss_function" in module.__dict__ else module
    return None


def _full_name(named: Any) -> str:
    return f"{named.__module__}.{getattr(named, '__qualname__', '')}"
