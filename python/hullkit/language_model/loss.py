# SPDX-License-Identifier: Apache-2.0
"""The loss of one example under a causal language model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .cross_entropy import next_token_loss, plain_next_token_loss
from .fused_modules import fused_head_weight, stand_ins
from .interface import (
    device_of,
    forward_parameters,
    is_compiled,
    logits_of,
    name_of,
    without_cache,
)
from .own_loss import (
    check_own_labels,
    logits_of_tokens,
    scores_first_label,
    scores_in_place,
    sees_later_tokens,
)
from .pass_copies import PassCopies
from .product_settings import autocast_of_pass, matmul_precision
from .products import WeightProducts
from .recompute import REPLACED, checkpointed_layers, checkpointing
from .recomputed_layers import recomputing, repeated_layers
from .saved_tensors import Saved

PRECISIONS = ("float32", "tf32", "bf16")


def check_depends(name: str, loss: Tensor) -> None:
    """Refuses a loss that has no gradient, before torch says so without a name."""
    if not loss.requires_grad:
        raise ValueError(
            f"{name}: expected a loss that depends on a parameter with requires_grad, got one that "
            "depends on none"
        )


class NotCausal(ValueError):
    """The model's logits depend on later tokens."""


class CausalLoss:
    """The loss of an example's keyword inputs, a batch of one.

    It is the model's own `.loss` if its forward takes `labels`, else the mean next-token cross
    entropy of its logits, in float32. It is that too where the model's own is not of next tokens:
    the first pass in which both can be told apart finds out.

    fuse: whether passes run cheaper pieces in place of the model's own (`fused_modules.py`).
    """

    def __init__(self, model: nn.Module, precision: str, compile: bool, fuse: bool) -> None:
        self._model = model
        self._fuse = fuse
        self.fused: tuple[str, ...] = ()  # names of what the latest pass replaced
        self._of_logits = next_token_loss if fuse else plain_next_token_loss
        self.autocast = precision == "bf16"
        self.in_place = False  # the model's own loss scores labels so
        self._loss_is_known = False
        self._in_doubt = False  # after a pass whose output did not tell
        self._is_causal: bool | None = True  # as the caller says; None while it is in doubt
        self._call: Callable[..., Any] = torch.compile(model) if compile else model
        self._compiles = compile

    @property
    def compiled(self) -> bool:
        """Whether passes go through torch.compile, by a tuner's wish or by their model's own."""
        return self._compiles or is_compiled(self._model)

    @property
    def fuses(self) -> bool:
        """Whether passes run other functions. The compiler fuses what it finds itself."""
        return self._fuse and not self.compiled

    def __call__(
        self,
        inputs: dict[str, Tensor],
        saved: Saved | None = None,
        copies: PassCopies | None = None,
        *,
        recompute: bool = False,
        products: WeightProducts | None = None,
    ) -> Tensor:
        """The loss of one pass, or of the second where the first has shown that it is another.

        saved: keeps the tensors that the backward pass needs; None leaves that to autograd.
        copies: copies of weights that the loss multiplies with.
        recompute: whether repeated layers run again in the backward half (`recomputed_layers.py`).
        products: is told of the gradients of linear layers' weights, where layers are fused.
        """
        return self._settled(
            lambda: self._of_pass(inputs, saved, copies, recompute, products), inputs
        )

    def _of_pass(
        self,
        inputs: dict[str, Tensor],
        saved: Saved | None,
        copies: PassCopies | None,
        recompute: bool,
        products: WeightProducts | None,
    ) -> Tensor:
        if self.compiled:  # the compiler decides itself what is saved, and checkpoints nothing
            self.fused = ()
            return self._of(self._call, inputs, self.autocast)
        layers = checkpointed_layers(self._model)
        # Layers that the user's checkpointing runs again are not run a third time.
        repeated = repeated_layers(self._model) if recompute and not layers else []
        pieces: AbstractContextManager[set[str]] = nullcontext(set())
        if self._fuse:
            # There the output has no logits, and the loss is one of next tokens.
            self._loss_is_known |= fused_head_weight(self._model) is not None
            plain = inputs.keys() <= {"input_ids", "labels"}
            again = [*layers, *repeated]
            pieces = stand_ins(
                self._model, saved, again, copies, plain_positions=plain, products=products
            )
        hooks = nullcontext() if saved is None else saved.hooks()
        with pieces as names, checkpointing(layers), recomputing(repeated), hooks:
            loss = self._of(self._call, inputs, self.autocast)
        self.fused = tuple(sorted((*names, REPLACED) if layers else names))
        return loss

    def plain(self, inputs: dict[str, Tensor]) -> Tensor:
        """The loss of the model as it is: not compiled, and in the model's own precision."""
        with matmul_precision("float32"):
            return self._settled(lambda: self._of(self._model, inputs, autocast=False), inputs)

    def beside_next_tokens(self, ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """The loss of ids (1, T) as `plain`, and the mean next-token one, of the same output.

        None where this loss is that one by its definition, as of a forward without `labels`.
        """
        if "labels" not in forward_parameters(self._model):
            return None
        output: Any = None

        def call(*args: Any, **inputs: Any) -> Any:
            nonlocal output
            output = self._model(*args, **inputs)
            return output

        inputs = {"input_ids": ids, "labels": ids}
        with matmul_precision("float32"):
            own = self._settled(lambda: self._of(call, inputs, autocast=False), inputs)
        return own, plain_next_token_loss(logits_of_tokens(output, ids), ids)

    def forward_alone(self, inputs: dict[str, Tensor]) -> None:
        """The model's own forward, as a pass calls it, and nothing in place of its parts."""
        self._of(self._model, inputs, self.autocast)

    def _of(self, call: Callable[..., Any], inputs: dict[str, Tensor], autocast: bool) -> Tensor:
        device = device_of(self._model, inputs["input_ids"])
        # Copies: a forward may write to labels, which may be ids, and the caller's. A graph has its
        # own tensors. Autograd takes no tensor of inference mode, but a copy of it.
        own = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        moved = self._moved(inputs, device, copy=not own)
        self._in_doubt = False
        with autocast_of_pass(device.type, autocast):
            ids, labels = moved.pop("input_ids"), moved.pop("labels")
            takes_labels = "labels" in forward_parameters(self._model)
            if takes_labels and self.in_place and not own:
                check_own_labels("labels", inputs["labels"], inputs["input_ids"])
            if not takes_labels:
                return self._of_logits(logits_of(call(ids, **moved), ids), labels)
            if self.in_place:
                return self._of_logits(logits_of_tokens(call(ids, **moved), ids), labels)
            output = call(input_ids=ids, labels=labels, **moved)
            loss = getattr(output, "loss", None)
            if not isinstance(loss, Tensor) or loss.ndim != 0:
                got = type(loss).__name__
                raise TypeError(f"model output: expected .loss, a scalar tensor, got {got}")
            if own or self._loss_is_known:
                return loss
            found = scores_in_place(output, labels)
            self._in_doubt = found is None
            if not self._note(found, inputs):
                return loss
            return self._of_logits(logits_of_tokens(output, ids), labels)

    def _moved(
        self, inputs: dict[str, Tensor], device: torch.device, copy: bool = True
    ) -> dict[str, Any]:
        moved: dict[str, Any] = {key: t.to(device, copy=copy) for key, t in inputs.items()}
        return without_cache(self._model) | moved

    def _note(self, found: bool | None, inputs: dict[str, Tensor]) -> bool:
        """Whether the model's own loss was found to score labels in their places."""
        self._loss_is_known = found is not None
        if found:
            check_own_labels("labels", inputs["labels"], inputs["input_ids"])
            self.in_place, self._is_causal = True, None
        return found is True

    def _settled(self, run: Callable[[], Tensor], inputs: dict[str, Tensor]) -> Tensor:
        """The loss that `run` returns. It runs again if its loss turns out not to be that."""
        loss = run()
        if self._in_doubt:
            device = device_of(self._model, inputs["input_ids"])

            def output(labels: Tensor) -> Any:
                return self._model(**self._moved(inputs, device) | {"labels": labels})

            with autocast_of_pass(device.type, self.autocast):
                found = scores_first_label(output, inputs["input_ids"].to(device))
            if self._note(found, inputs):
                del loss  # and its graph
                loss = run()
        self._check_causal(inputs)
        return loss

    def _check_causal(self, inputs: dict[str, Tensor]) -> None:
        """After a pass in which the model's own loss was of other tokens: masked models' is too."""
        if self._is_causal is None:
            device = device_of(self._model, inputs["input_ids"])
            options = without_cache(self._model)
            with autocast_of_pass(device.type, self.autocast):
                self._is_causal = not sees_later_tokens(
                    lambda ids: self._model(ids, **options), inputs["input_ids"].to(device)
                )
        if not self._is_causal:
            raise NotCausal(
                f"model: expected a causal language model, got {name_of(self._model)}, "
                "whose logits depend on later tokens"
            )
