# SPDX-License-Identifier: Apache-2.0
"""A query's passes as CUDA graphs, one for each shape of an example.

A pass records its updates too, group by group, beside its backward half.
"""

from __future__ import annotations

from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..language_model.interface import longest_padded
from ..language_model.loss import CausalLoss
from ..language_model.saved_tensors import Saved
from ..optim._record import AdamOptions
from .activations import ActivationPlan
from .base_weights import Weights, pass_copies
from .capture_memory import CaptureMemory, hooks, warm_up
from .grouped_updates import GroupedUpdates
from .padding import Inputs, Padding
from .recorded_passes import Allowed, RecordedPasses, Recording
from .rounding import Rounding
from .schedule import Reuse

MAX_GRAPHS = 32  # of one model; the one that was used longest ago makes room
# Where at most one in so many elements of a model is trained, all gradients may exist together.
_SMALL_PART = 16


class CapturedPasses:
    """Graphs of a model's passes and their updates. All graphs share one pool of memory.

    loss_of: computes the loss of one example's inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        model_tensors: list[Tensor],
        parameters: list[nn.Parameter],
        loss_of: CausalLoss,
        activations: ActivationPlan,
        *,
        host_snapshot: bool,
        rounding: Rounding,
    ) -> None:
        self._model = model
        self._loss_of = loss_of
        self.copies = pass_copies(model, loss_of)
        self.weights = Weights(
            parameters, host=host_snapshot, copies=self.copies, rounding=rounding
        )
        self._tensors = _addresses(model_tensors)
        self._capacity = 64
        self._padding = Padding(longest_padded(model), self._plain_loss)
        self._memory = CaptureMemory(self.weights.device)
        self.plan = activations
        self._passes = RecordedPasses[_Pass](model, self._memory, MAX_GRAPHS)

    def fits(self, model_tensors: list[Tensor]) -> bool:
        """Whether the graphs still read and write these tensors of the model."""
        return _addresses(model_tensors) == self._tensors

    @property
    def lengths(self) -> list[int]:
        """The lengths of recorded passes of token ids and labels alone, the shortest first."""
        shapes: Any = self._passes
        plain = (dict((name, size) for name, size, _ in shape) for shape in shapes)
        return sorted(
            {sizes["input_ids"][1] for sizes in plain if sizes.keys() == {"input_ids", "labels"}}
        )

    def prepare(
        self, examples: dict[int, Inputs], most_steps: int
    ) -> dict[int, tuple[_Pass, Inputs]]:
        """Each example's pass, recorded now if it is new, and its inputs on the device.

        Recording runs the model, which may write its buffers: the caller restores them afterwards.

        Raises NotCapturable; torch.OutOfMemoryError.
        """
        self.copies.refresh()
        if most_steps > self._capacity:
            self._passes.release()
            self._capacity = 1 << (most_steps - 1).bit_length()
        # The longest comes first: the passes of the others fit into its memory.
        by_size = sorted(examples, key=lambda i: -examples[i]["input_ids"].numel())
        return {i: self._of(examples[i]) for i in by_size}

    def _of(self, inputs: Inputs) -> tuple[_Pass, Inputs]:
        if inputs.keys() == {"input_ids", "labels"}:
            inputs = self._padding(inputs)
        device = self.weights.device
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
        shape = tuple((name, t.shape, t.dtype) for name, t in inputs.items())

        def record(recording: Recording) -> _Pass:
            with self.copies.in_place():
                return _Pass(self, inputs, recording)

        loss_of = self._loss_of
        recorded = self._passes.of(
            shape, record, lambda: Allowed(not loss_of.compiled, loss_of.fuses)
        )
        return recorded, inputs

    def _plain_loss(self, inputs: Inputs) -> float:
        # With autocast the copies stand for its casts; the plain model runs without autocast.
        own = nullcontext() if self._loss_of.autocast else self.copies.in_place()
        with torch.no_grad(), self._memory.apart(), own:
            return self._loss_of.plain(inputs).double().item()

    def run(
        self, passes: dict[int, tuple[_Pass, Inputs]], schedule: list[Reuse], options: AdamOptions
    ) -> list[tuple[float, bool]]:
        """Each burst's loss, and whether all its gradients were finite. Waits for the device."""
        for recorded in {id(p): p for p, _ in passes.values()}.values():
            recorded.updates.set_options(options)
        results = torch.zeros(len(schedule), 2, dtype=torch.float64, device=self.weights.device)
        for result, (example, num_steps) in zip(results.unbind(), schedule, strict=True):
            recorded, inputs = passes[example]
            recorded.replay(inputs, num_steps, result)
        return [(loss, broken == 0.0) for loss, broken in results.tolist()]


class _Pass:
    """One graph: forward pass, backward pass, and each group's updates when its gradients exist."""

    def __init__(self, owner: CapturedPasses, inputs: Inputs, recording: Recording) -> None:
        parameters = owner.weights.parameters
        self._recording = recording
        # The graph reads these at every replay and does not keep them alive; this object does.
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self._result = torch.zeros(2, dtype=torch.float64, device=owner.weights.device)
        order, held = warm_up(
            owner._model, parameters, owner._loss_of, self._inputs, owner.copies, recording.memory,
            owner.plan, recording.noted,
        )  # fmt: skip
        self.recomputes = owner.plan.recomputes(self._inputs)
        trained = sum(parameter.numel() for parameter in order)
        together = _SMALL_PART * trained <= sum(p.numel() for p in owner._model.parameters())
        self.updates = GroupedUpdates(owner.weights, order, owner._capacity, together)

        def recorded() -> None:
            try:
                self.updates.begin()
                with hooks(parameters, self.updates.ready), recording.served():
                    loss = owner._loss_of(
                        self._inputs, Saved(), owner.copies,
                        recompute=self.recomputes, products=self.updates,
                    )  # fmt: skip
                    loss.backward()
                self.updates.join()
                self._result[0].copy_(loss.detach())
                self._result[1].copy_(self.updates.broken())
            finally:
                with suppress(Exception):  # a capture must not end with streams apart
                    self.updates.join()

        try:
            self._graph = recording.graph(held, recorded)
            self.updates.set_gradients()
            self.fused = tuple(sorted((*owner._loss_of.fused, *recording.replaced)))
        finally:
            for parameter in parameters:
                parameter.grad = None  # its memory stays in the graph's pool

    def replay(self, inputs: Inputs, num_steps: int, result: Tensor) -> None:
        for name, tensor in self._inputs.items():
            tensor.copy_(inputs[name], non_blocking=True)
        self.updates.set_num_steps(num_steps)
        self._graph.replay()
        result.copy_(self._result)


def _addresses(tensors: list[Tensor]) -> list[Any]:
    """The facts of a model that a graph depends on: where tensors lie, and which are trained."""
    return [(id(t), t.data_ptr(), t.dtype, t.shape, t.stride(), t.requires_grad) for t in tensors]
