# SPDX-License-Identifier: Apache-2.0
"""Passes of all slots at once: eager, or CUDA graphs, one for each length."""

from __future__ import annotations

import gc
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

import torch
from torch import Tensor, nn

from ..language_model.cross_entropy import linear_next_token_losses, next_token_losses
from ..language_model.experts import without_questions
from ..language_model.fused_modules import fused_head_weight, stand_ins
from ..language_model.host_constants import HostConstants
from ..language_model.interface import logits_of, without_cache
from ..language_model.loss import matmul_precision
from ..language_model.products import SharedInputs
from .factors import SlotFactors
from .layers import SlotForwards

MAX_GRAPHS = 32
Block = Callable[[], AbstractContextManager[None]]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in eval mode, and no parameter gets a gradient."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for module, _ in modes:
            module.training = False
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter in trained:
            parameter.requires_grad_(True)


class SlotPasses:
    """Forward and backward passes of K texts, each with its slot's factors, and the updates.

    capture: as TestTimeFinetuner's. scale: what the loss is multiplied with, for float16 gradients.
    capacity: the most updates with one gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        factors: SlotFactors,
        forwards: SlotForwards,
        *,
        precision: str,
        capture: bool | None,
        scale: float,
        capacity: int,
    ) -> None:
        self._model = model
        self._factors = factors
        self._forwards = forwards
        self._precision = precision
        self._scale = scale
        self.capacity = capacity
        self._device = factors.params.device
        self._anchor = torch.zeros((), device=self._device, requires_grad=True)
        self._options = without_cache(model)
        self._capture = capture
        self._graphs: OrderedDict[int, _Graph] = OrderedDict()
        self._plain = True  # until the forward pass as it is could not be recorded
        self.path = "eager"
        if capture and self._device.type != "cuda":
            raise ValueError("capture: expected a model on a CUDA device for True, got a CPU")
        self.captures = self._device.type == "cuda" and capture is not False
        if self.captures:
            self.stream = torch.cuda.Stream(self._device)
            self.pool = torch.cuda.graph_pool_handle()

    def products(self) -> AbstractContextManager[None]:
        """A block in which products have the precision that was asked for."""
        return matmul_precision("tf32" if self._precision == "tf32" else "float32")

    def autocast(self) -> torch.autocast:
        on = self._precision == "bf16"
        return torch.autocast(self._device.type, torch.bfloat16, enabled=on)

    def run(self, tokens: Tensor, control: Tensor) -> tuple[Tensor, Tensor]:
        """Each slot's loss (K,), and 1 (K,) int32 where a gradient was not finite.

        tokens: (2, K, T) int64 on the host: ids, and labels. control: as `SlotFactors.update_`.
        """
        with evaluating(self._model), self.products():
            graph = self._graph(tokens) if self.captures else None
            if graph is not None:
                self.path = "captured"
                return graph.replay(tokens, control)
            self.path = "eager"
            return self.whole(tokens.to(self._device), control.to(self._device))

    def whole(self, tokens: Tensor, control: Tensor) -> tuple[Tensor, Tensor]:
        """A pass and its updates, on the device."""
        losses = self.gradients(tokens)
        broken = torch.zeros(len(losses), dtype=torch.int32, device=self._device)
        self._factors.update_(control, broken)
        return losses, broken

    def gradients(self, tokens: Tensor, served: Block = nullcontext) -> Tensor:
        """Each slot's loss (K,). Gradients of the factors are in their memory afterwards."""
        ids, labels = tokens.unbind()
        head = fused_head_weight(self._model)
        inputs = SharedInputs()
        pieces = stand_ins(self._model, inputs=inputs, plain_positions=True)
        with self._forwards.all(self._anchor, inputs), served():
            with pieces, self.autocast():
                out = logits_of(self._model(ids, **self._options), ids)
                if head is None:
                    total, losses = next_token_losses(out, labels)
                else:  # the last layer has returned its input
                    total, losses = linear_next_token_losses(out, head, labels)
            (total * self._scale).backward()
        return losses

    def _graph(self, tokens: Tensor) -> _Graph | None:
        length = tokens.shape[2]
        known = self._graphs.get(length)
        if known is None:
            while len(self._graphs) >= MAX_GRAPHS:
                self._graphs.popitem(last=False)
            known, reason = self._attempt(tokens, None) if self._plain else (None, "")
            if known is None:
                own = (*self._model.parameters(), *self._model.buffers())
                known, reason = self._attempt(tokens, HostConstants(self._device, own))
                self._plain = known is None
            if known is None:
                if self._capture:
                    raise RuntimeError(f"capture: expected a pass that can be recorded: {reason}")
                warnings.warn(
                    f"passes run eagerly, for one was not recorded: {reason}", stacklevel=5
                )
                self.captures = False
                return None
            self._graphs[length] = known
        self._graphs.move_to_end(length)
        return known

    def _attempt(
        self, tokens: Tensor, constants: HostConstants | None
    ) -> tuple[_Graph | None, str]:
        experts = nullcontext() if constants is None else without_questions(self._model)
        current = torch.cuda.current_stream(self._device)
        self.stream.wait_stream(current)
        try:
            with experts:
                return _Graph(self, tokens, self._factors, constants), ""
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.pool = torch.cuda.graph_pool_handle()  # the failed capture leaves it unusable
            return None, f"{type(error).__name__}: {error}".partition("\n")[0]
        finally:
            current.wait_stream(self.stream)

    def release(self) -> None:
        """Frees the graphs and their memory."""
        self._graphs.clear()
        if self.captures:
            self.pool = torch.cuda.graph_pool_handle()
            torch.cuda.empty_cache()


class _Graph:
    """A captured pass of one length, with its updates."""

    def __init__(
        self, owner: SlotPasses, tokens: Tensor, factors: SlotFactors,
        constants: HostConstants | None,
    ) -> None:  # fmt: skip
        device = factors.params.device
        noted, served = (constants.noted, constants.served) if constants else (nullcontext,) * 2
        self._constants = constants  # the graph reads its tensors
        collecting = gc.isenabled()
        failure: Exception | None = None
        with torch.cuda.stream(owner.stream):
            self._tokens = tokens.to(device)
            idle = factors.control([0] * factors.slots, [0] * factors.slots, [0.0] * factors.slots,
                                   owner.capacity)  # fmt: skip
            self._control = idle.to(device)
            # Everything lazy is done before the capture; without updates nothing changes.
            owner.gradients(self._tokens, noted)
            owner.whole(self._tokens, self._control)
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        self._graph = torch.cuda.CUDAGraph()
        gc.disable()  # collecting another graph during a capture would end the capture
        try:
            with torch.cuda.graph(
                self._graph, pool=owner.pool, stream=owner.stream,
                capture_error_mode="thread_local",
            ):  # fmt: skip
                try:  # after a failure the end of the capture raises, too, and hides the reason
                    self._losses = owner.gradients(self._tokens, served)
                    self._broken = torch.zeros(factors.slots, dtype=torch.int32, device=device)
                    factors.update_(self._control, self._broken)
                except Exception as error:
                    failure = error
        except Exception as error:
            failure = failure or error
        finally:
            if collecting:
                gc.enable()
        if failure is not None:
            with suppress(Exception):
                torch.cuda.synchronize(device)
            raise failure

    def replay(self, tokens: Tensor, control: Tensor) -> tuple[Tensor, Tensor]:
        self._tokens.copy_(tokens, non_blocking=True)
        self._control.copy_(control, non_blocking=True)
        self._graph.replay()
        return self._losses.clone(), self._broken.clone()
