# SPDX-License-Identifier: Apache-2.0
"""Passes as CUDA graphs: recorded once for each shape of an example, and replayed.

A pass records its updates too, group by group, beside its backward half.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..language_model.experts import without_questions
from ..language_model.host_constants import HostConstants
from ..language_model.interface import longest_padded
from ..language_model.loss import CausalLoss
from ..language_model.saved_tensors import Saved
from ..optim import _kernels
from ..optim._record import BROKEN, HEAD, LIMIT, NUM_OPTIONS, SEED, AdamOptions
from ..optim._tensor_table import HALVES, same_layout
from .activations import ActivationPlan
from .base_weights import NotCapturable, Weights, pass_copies
from .capture_memory import MAX_GRAPHS, CaptureMemory, hooks, update_stream, warm_up
from .padding import Inputs, Padding
from .rounding import Rounding, moment_dtype
from .schedule import Reuse
from .snapshot import Attributes

# Elements whose updates are launched together: enough to fill a GPU, few enough to begin early.
GROUP_ELEMENTS = 2 << 20
Shape = tuple[tuple[str, torch.Size, torch.dtype], ...]


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
        self._passes: OrderedDict[Shape, _Pass] = OrderedDict()
        self._plain = True  # until the forward pass as it is could not be recorded

    def fits(self, model_tensors: list[Tensor]) -> bool:
        """Whether the graphs still read and write these tensors of the model."""
        return _addresses(model_tensors) == self._tensors

    def prepare(
        self, examples: dict[int, Inputs], most_steps: int
    ) -> dict[int, tuple[_Pass, Inputs]]:
        """Each example's pass, recorded now if it is new, and its inputs on the device.

        Recording runs the model, which may write its buffers: the caller restores them afterwards.

        Raises NotCapturable; torch.OutOfMemoryError.
        """
        self.copies.refresh()
        if most_steps > self._capacity:
            self._passes.clear()
            self._memory.renew()
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
        known = self._passes.get(shape)
        if known is None:
            while len(self._passes) >= MAX_GRAPHS:
                self._passes.popitem(last=False)
            known = self._passes[shape] = self._record(inputs)
        self._passes.move_to_end(shape)
        return known, inputs

    def _plain_loss(self, inputs: Inputs) -> float:
        # With autocast the copies stand for its casts; the plain model runs without autocast.
        own = nullcontext() if self._loss_of.autocast else self.copies.in_place()
        with torch.no_grad(), self._memory.apart(), own:
            return self._loss_of.plain(inputs).double().item()

    def _record(self, inputs: Inputs) -> _Pass:
        slots = [dict(m._buffers) for m in self._model.modules()]
        recorded, reason = self._attempt(inputs, None) if self._plain else (None, "")
        if recorded is None and not self._loss_of.compiled:
            # Watching every operation has a cost: only models that need it pay.
            own = (*self._model.parameters(), *self._model.buffers())
            constants = HostConstants(self.weights.device, own)
            recorded, reason = self._attempt(inputs, constants)
            self._plain = recorded is None
        if recorded is None:
            raise NotCapturable(reason)
        for was, module in zip(slots, self._model.modules(), strict=True):
            if [*map(id, was.values())] != [*map(id, module._buffers.values())]:
                raise NotCapturable("forward replaces a buffer instead of writing to it")
        return recorded

    def _attempt(self, inputs: Inputs, constants: HostConstants | None) -> tuple[_Pass | None, str]:
        """A recorded pass, or why there is none. With constants experts ask no questions."""
        static = constants is not None and self._loss_of.fuses
        experts = without_questions(self._model) if static else nullcontext(())
        try:
            with self._memory.apart(), self.copies.in_place(), experts as names:
                recorded = _Pass(self, inputs, constants)
                recorded.fused = tuple(sorted((*recorded.fused, *names)))
                return recorded, ""
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._memory.renew()
            # The error is not kept: its frames hold tensors, which hold memory of the stream.
            return None, f"{type(error).__name__}: {error}".partition("\n")[0]

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

    def __init__(
        self, owner: CapturedPasses, inputs: Inputs, constants: HostConstants | None
    ) -> None:
        parameters = owner.weights.parameters
        self._constants = constants
        noted, served = (constants.noted, constants.served) if constants else (nullcontext,) * 2
        # The graph reads these at every replay and does not keep them alive; this object does.
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self._result = torch.zeros(2, dtype=torch.float64, device=owner.weights.device)
        order, held = warm_up(
            owner._model, parameters, owner._loss_of, self._inputs, owner.copies, owner._memory,
            owner.plan, noted,
        )  # fmt: skip
        self.recomputes = owner.plan.recomputes(self._inputs)
        # A model may replace a tensor that it keeps as an attribute; the graph reads the old one.
        self._tables = Attributes(list(owner._model.modules())).tensors
        self.updates = GroupedUpdates(owner.weights, order, owner._capacity)

        def recorded() -> None:
            try:
                self.updates.begin()
                with hooks(parameters, self.updates.ready), served():
                    loss = owner._loss_of(
                        self._inputs, Saved(), owner.copies, recompute=self.recomputes
                    )
                    loss.backward()
                self.updates.join()
                self._result[0].copy_(loss.detach())
                self._result[1].copy_(self.updates.broken())
            finally:
                with suppress(Exception):  # a capture must not end with streams apart
                    self.updates.join()

        try:
            self._graph = owner._memory.record(held, recorded)
            self.updates.set_gradients()
            self.fused = owner._loss_of.fused
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
    return [(id(t), t.data_ptr(), t.dtype, t.requires_grad) for t in tensors]


class GroupedUpdates:
    """Adam's updates of one captured pass, in groups that start when their gradients are ready.

    They run on a stream of their own. The gaps of the backward pass hide about a tenth of them;
    not more, since both want the memory. A gradient lives until its update. The backward pass waits
    for the group before last, so that all gradients never exist together.

    order: the parameters that get a gradient, in that order, and the dtype of each gradient.
    capacity: the most updates with one gradient.
    """

    def __init__(
        self, weights: Weights, order: dict[nn.Parameter, torch.dtype], capacity: int
    ) -> None:
        self._side = update_stream(weights.device)
        self._parts: list[_Part] = []
        self._group_of: dict[nn.Parameter, _Group] = {}
        kinds: dict[Any, list[nn.Parameter]] = {}
        for parameter, dtype in order.items():
            copied = weights.copies.of(parameter) is not None
            kind = (weights.copies.data_of(parameter).dtype, dtype, copied)
            kinds.setdefault(kind, []).append(parameter)
        for (_, dtype, _), own in kinds.items():
            part = _Part(weights, own, dtype, capacity)
            self._parts.append(part)
            for group in part.groups:
                self._group_of |= dict.fromkeys(group.parameters, group)
        self._rehearse()

    def _rehearse(self) -> None:
        """Launches every kernel with no update, so that all are compiled before the capture."""
        for part in self._parts:
            part.set_addresses([p.data_ptr() for p in part.parameters])  # as large as gradients
            part.set_num_steps(0)
        self.begin()
        for group in {id(g): g for g in self._group_of.values()}.values():
            group.launch()

    def set_options(self, options: AdamOptions) -> None:
        for part in self._parts:
            part.set_options(options)

    def set_num_steps(self, num_steps: int) -> None:
        """Sets the number of updates of the next replay."""
        for part in self._parts:
            part.set_num_steps(num_steps)

    # A capture records these methods.

    def begin(self) -> None:
        self._waiting = {id(g): len(g.parameters) for g in self._group_of.values()}
        self._under_way: list[tuple[_Group, torch.cuda.Event]] = []
        for part in self._parts:
            part.record[BROKEN].zero_()
            part.move_on()

    def ready(self, parameter: nn.Parameter) -> None:
        """Notes that a parameter's gradient is complete; the last of a group launches the group."""
        group = self._group_of[parameter]
        group.addresses[parameter] = _gradient(parameter).data_ptr()
        self._waiting[id(group)] -= 1
        if self._waiting[id(group)] > 0:
            return
        self._side.wait_stream(torch.cuda.current_stream(self._side.device))
        with torch.cuda.stream(self._side):
            group.launch()
            done = torch.cuda.Event()
            done.record()
        self._under_way.append((group, done))
        if len(self._under_way) > 2:
            self._finish_first()

    def _finish_first(self) -> None:
        group, done = self._under_way.pop(0)
        torch.cuda.current_stream(self._side.device).wait_event(done)
        for parameter in group.parameters:
            parameter.grad = None

    def join(self) -> None:
        while self._under_way:
            self._finish_first()

    def broken(self) -> Tensor:
        """[] int64, 0 if all gradients were finite."""
        return torch.stack([part.record[BROKEN] for part in self._parts]).amax()

    # After the capture.

    def set_gradients(self) -> None:
        """Tells the kernels where the captured pass has its gradients."""
        for part in self._parts:
            addresses = {p: a for group in part.groups for p, a in group.addresses.items()}
            part.set_addresses([addresses[p] for p in part.parameters])


class _Part:
    """Parameters with one dtype, gradients with one dtype, and copies for all of them or none."""

    def __init__(
        self,
        weights: Weights,
        parameters: list[nn.Parameter],
        grad_dtype: torch.dtype,
        capacity: int,
    ) -> None:
        self.parameters = parameters
        self.table = weights.table(parameters)
        dtype = weights.copies.data_of(parameters[0]).dtype
        self.dtypes = (dtype, grad_dtype, moment_dtype(dtype))
        self.stochastic = weights.rounding.stochastic and dtype in HALVES
        copies = [weights.copies.of(parameter) for parameter in parameters]
        addresses = [copy.data_ptr() for copy in copies if copy is not None]
        self.copies = (
            torch.tensor(addresses, dtype=torch.int64, device="cpu").to(weights.device)
            if addresses
            else None
        )
        math = _kernels.arithmetic_dtype(dtype)
        size = (len(parameters), capacity, 2)
        self.coefficients = torch.zeros(size, dtype=math, device=weights.device)
        self.record = torch.zeros(HEAD + len(parameters), dtype=torch.int64, device=weights.device)
        self.record[SEED].fill_(weights.rounding.seed)
        self.options: AdamOptions | None = None
        self.groups: list[_Group] = []
        first = elements = 0
        for row, parameter in enumerate(parameters):
            elements += parameter.numel()
            if elements >= GROUP_ELEMENTS or row == len(parameters) - 1:
                self.groups.append(_Group(self, range(first, row + 1)))
                first, elements = row + 1, 0

    def set_options(self, options: AdamOptions) -> None:
        if options != self.options:
            words = torch.tensor(options, dtype=torch.float64, device="cpu").view(torch.int64)
            self.record[:NUM_OPTIONS].copy_(words)
            self.options = options

    def set_num_steps(self, num_steps: int) -> None:
        self.record[LIMIT].fill_(num_steps)

    def set_addresses(self, addresses: list[int]) -> None:
        self.record[HEAD:].copy_(torch.tensor(addresses, dtype=torch.int64, device="cpu"))

    def move_on(self) -> None:
        capacity = self.coefficients.shape[1]
        _kernels.adam_coefficients_(self.table, self.record, self.coefficients, capacity)


class _Group:
    """Neighbouring rows of a table, updated by one launch."""

    def __init__(self, part: _Part, rows: range) -> None:
        self.parameters = part.parameters[rows.start : rows.stop]
        self.addresses: dict[nn.Parameter, int] = {}  # of the gradients
        self._part = part
        self._chunks = part.table.chunks_of(rows)

    def launch(self) -> None:
        part = self._part
        _kernels.adam_chunks_(
            part.table, self._chunks, part.record, part.coefficients, part.dtypes,
            part.coefficients.shape[1], part.stochastic, part.copies,
        )  # fmt: skip


def _gradient(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    if gradient is None or not same_layout(gradient, parameter):
        raise RuntimeError(
            f"expected a gradient laid out as its parameter of shape {tuple(parameter.shape)}"
        )
    return gradient
