# SPDX-License-Identifier: Apache-2.0
"""Faster functions that run in place of a model's own while a pass lasts.

Functions of torch are fused wherever a model calls them (`fused_functions.py`). Models also write
norms and activations out in small steps; a module is replaced here if it was found, on random
numbers, to compute a known formula. The loss and the last layer are found by their classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import causal_masks, rotary
from .cross_entropy import TiedGradient, linear_next_token_loss, next_token_loss
from .fused_functions import FusedFunctions
from .gated_layers import GatedLayer
from .interface import forward_parameters, is_compiled
from .low_rank import LowRank
from .norms import Norm
from .pass_copies import PassCopies
from .products import SharedInputs, WeightProducts
from .proofs import proof
from .replaced_globals import replaced_globals
from .saved_tensors import Saved

Forward = Callable[[Tensor], Tensor]

# Classes are known by their full names, so transformers is never imported.
_MODELS = "transformers.models.{0}.modeling_{0}.{1}"
_FAMILIES = (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"))
# The forward of these gives lm_head's output to the loss and returns it, and no more.
_HEADS = {_MODELS.format(family, f"{name}ForCausalLM") for family, name in _FAMILIES}
_HEADS.add(_MODELS.format("gpt2", "GPT2LMHeadModel"))
_PASSING_ON = {"peft.peft_model.PeftModelForCausalLM"}  # wrappers that only return what those do
_LOSS = "transformers.loss.loss_utils.ForCausalLMLoss"
_REWEIGHTED = ("num_items_in_batch", "shift_labels", "ignore_index")  # options that change the loss


class _Loss:
    """The loss of transformers' causal models, from logits or from the input of `lm_head`.

    Where nothing else sees the logits, `lm_head` returns its input, and the loss multiplies.
    """

    def __init__(
        self,
        own: Callable[..., Tensor],
        lm_head: nn.Linear | None,
        tied: TiedGradient | None,
        copies: PassCopies | None,
    ) -> None:
        self._own = own
        self._tied = tied
        self._weight = None if lm_head is None else lm_head.weight
        self._copy = (
            copies.of(lm_head.weight) if copies is not None and lm_head is not None else None
        )
        self._hidden: Tensor | None = None

    def hold(self, hidden: Tensor) -> Tensor:
        """The forward of `lm_head`: keeps its input for the loss."""
        self._hidden = hidden
        return hidden

    def __call__(self, logits: Tensor, labels: Tensor, *sizes: Any, **options: Any) -> Tensor:
        hidden, self._hidden = self._hidden, None
        if hidden is not None and logits is not hidden:
            raise RuntimeError("expected a loss of what lm_head returned, got another tensor")
        reweighted = any(options.get(name) is not None for name in _REWEIGHTED)
        # A CPU gains nothing. The model's own loss casts float64 logits to float32, and runs then.
        fused = not reweighted and logits.is_cuda and logits.dtype is not torch.float64
        if hidden is not None and self._weight is not None:
            if fused and hidden.shape[:2] == labels.shape:
                return linear_next_token_loss(hidden, self._weight, labels, self._tied, self._copy)
            logits = F.linear(hidden, self._weight)
        return (
            next_token_loss(logits, labels)
            if fused
            else self._own(logits, labels, *sizes, **options)
        )


def _fused_forward(module: nn.Module, functions: FusedFunctions) -> Forward | None:
    """A forward by fused functions, if the module was found to compute the same; else None."""
    found = proof(module)
    if found is None:
        return None
    if isinstance(found, str):
        fused = partial(functions.activation, found)
    elif isinstance(found, Norm):
        fused = partial(_rms_norm, module, functions, found)
    elif isinstance(found, GatedLayer):
        fused = partial(_gated_layer, module, functions, found)
    else:
        functions.adapted.note(module, found)
        fused = partial(_low_rank, module, functions, found)
    return partial(_of_one_input, module, fused)


def _of_one_input(module: Any, fused: Forward, *inputs: Any, **named: Any) -> Tensor:
    """The fused forward of one tensor. A proof says nothing of calls with more, such as a gate."""
    if len(inputs) == 1 and not named:
        return fused(*inputs)
    return type(module).forward(module, *inputs, **named)  # type: ignore[no-any-return]


def _rms_norm(module: Any, functions: FusedFunctions, formula: Norm, x: Tensor) -> Tensor:
    y = functions.rms_norm(x, module.weight, formula)
    return type(module).forward(module, x) if y is NotImplemented else y  # type: ignore[no-any-return]


def _low_rank(module: Any, functions: FusedFunctions, adapter: LowRank, x: Tensor) -> Tensor:
    y = functions.low_rank(module, adapter, x)
    return type(module).forward(module, x) if y is NotImplemented else y  # type: ignore[no-any-return]


def _gated_layer(module: Any, functions: FusedFunctions, found: GatedLayer, x: Tensor) -> Tensor:
    gate, up, down, act = (module._modules[name] for name in found[:4])
    a, b = gate(x), up(x)
    y = functions.gated(a, b, found.activation)
    return down(act(a) * b if y is NotImplemented else y)  # type: ignore[no-any-return]


@contextmanager
def stand_ins(
    model: nn.Module,
    saved: Saved | None = None,
    checkpointed: Sequence[nn.Module] = (),
    copies: PassCopies | None = None,
    backend: str | None = None,
    plain_positions: bool = False,
    inputs: SharedInputs | None = None,
    products: WeightProducts | None = None,
) -> Iterator[set[str]]:
    """Inside the block the model computes the same, cheaper. What others have replaced stays.

    The block gets a set, which has the names of the replaced methods and functions at its end. It
    stays empty on a CPU, which has no cheaper kernels, and for a model that is compiled: the
    compiler would trace the stand-ins, and fuses what it finds itself.

    saved: recomputes the outputs of activations, so that they need not be saved.
    checkpointed: layers that run again in the backward pass, outside of the block. Nothing in them
        is replaced, and with such layers no function of torch.
    copies: may have a copy of the last layer's weight, which its product then reads.
    plain_positions: whether the pass is of one text whose positions are 0, 1, 2, ...
    backend: "triton" takes CPU tensors too, in Triton's interpreter.
    inputs: of the linear layers, where the caller's layers share them.
    products: is told of the gradients of linear layers' weights, and offered adapters'.
    """
    again = {module for layer in checkpointed for module in layer.modules()}
    replaced: list[tuple[nn.Module, str]] = []
    names: set[str] = set()

    def replace(module: Any, attribute: str, stand_in: Callable[..., Tensor], name: str) -> None:
        names.add(name)
        replaced.append((module, attribute))
        setattr(module, attribute, stand_in)

    def replace_forward(module: Any, stand_in: Forward) -> None:
        replace(module, "forward", stand_in, f"{_full_name(type(module))}.forward")

    if is_compiled(model) or not has_kernels_for(model, backend):
        yield names
        return
    functions = FusedFunctions(saved, backend, inputs, products)
    try:
        for module in model.modules():
            if "forward" not in module.__dict__ and module not in again:
                forward = _fused_forward(module, functions)
                if forward is not None:
                    replace_forward(module, forward)
        head = _head_with_known_loss(model)
        if head is not None:
            lm_head = _lm_head(model, head)
            embedding = None if lm_head is None else _tied_embedding(head, lm_head.weight)
            tied = None if embedding is None else TiedGradient()
            loss = _Loss(head.loss_function, lm_head, tied, copies)
            replace(head, "_loss_function", loss, _LOSS)
            if lm_head is not None:
                replace_forward(lm_head, loss.hold)
            if tied is not None:
                replace_forward(embedding, partial(tied.embedding, weight=lm_head.weight))
        found = causal_masks.replacements() if plain_positions else []
        if not checkpointed:
            found += rotary.replacements(model, functions.takes, functions.note_rotation, names)
        with replaced_globals(found), nullcontext() if checkpointed else functions:
            yield names
        names |= functions.names
        functions.adapted.note_readers()
    finally:
        for module, attribute in replaced:
            module.__dict__.pop(attribute, None)


def has_kernels_for(model: nn.Module, backend: str | None) -> bool:
    """Whether passes of the model may run kernels; without any, a stand-in gains nothing."""
    return backend == "triton" or any(p.is_cuda for p in model.parameters())


def fused_head_weight(model: nn.Module) -> Tensor | None:
    """The weight of the last layer, if `stand_ins` lets the loss compute its product; else None."""
    head = None if is_compiled(model) else _head_with_known_loss(model)
    lm_head = None if head is None else _lm_head(model, head)
    return None if lm_head is None else lm_head.weight


def _head_with_known_loss(model: nn.Module) -> Any:
    """The model of transformers, if its loss is the mean next-token cross entropy; else None."""
    head = _head(model)
    return head if head is not None and _full_name(head.loss_function) == _LOSS else None


def _head(model: nn.Module) -> Any:
    """The model of transformers inside its wrappers, if its loss is its class's own; else None."""
    for module in model.modules():
        if hasattr(type(module), "loss_function") and "labels" in forward_parameters(module):
            return None if "_loss_function" in module.__dict__ else module
    return None


def _lm_head(model: nn.Module, head: Any) -> Any:
    """The last layer, if only the loss sees its output; else None."""
    around = [] if model is head else [model]
    lm_head: Any = getattr(head, "lm_head", None)
    name = _full_name(type(head))
    if (
        _full_name(type(lm_head)) != "torch.nn.modules.linear.Linear"
        or lm_head.bias is not None
        or not lm_head.weight.is_cuda
        or name not in _HEADS
        or _full_name(type(head).forward) != f"{name}.forward"
        or any(_full_name(type(module)) not in _PASSING_ON for module in around)
    ):
        return None
    for module in (*around, head, lm_head):
        if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
            return None
    return lm_head


def _tied_embedding(head: Any, weight: Tensor) -> nn.Embedding | None:
    """The embedding with the last layer's weight, if it only looks up rows; else None."""
    embedding = head.get_input_embeddings()
    if (
        _full_name(type(embedding)) != "torch.nn.modules.sparse.Embedding"
        or embedding.weight is not weight
        or "forward" in embedding.__dict__
        or embedding.max_norm is not None
        or embedding.scale_grad_by_freq
        or embedding.sparse
        or embedding.padding_idx is not None
    ):
        return None
    return embedding  # type: ignore[no-any-return]


def _full_name(named: Any) -> str:
    return f"{named.__module__}.{getattr(named, '__qualname__', '')}"
