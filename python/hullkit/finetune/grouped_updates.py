# SPDX-License-Identifier: Apache-2.0
"""The updates of a captured pass, which run beside its backward half."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..optim import _kernels
from ..optim._kernels import SavedRows
from ..optim._record import BROKEN, HEAD, LIMIT, NUM_OPTIONS, SEED, AdamOptions
from ..optim._tensor_table import HALVES, same_layout
from .base_weights import Weights
from .capture_memory import facts, facts_when_complete, tied_stream, update_stream
from .rounding import moment_dtype

# Elements whose updates are launched together: enough to fill a GPU, few enough to begin early.
GROUP_ELEMENTS = 2 << 20


class GroupedUpdates:
    """Adam's updates of one captured pass, in groups that start when their gradients are ready.

    They run on a stream of their own. The gaps of the backward pass hide about a tenth of them;
    not more, since both want the memory. A gradient lives until its update. The backward pass waits
    for the group before last, so that all gradients never exist together.

    The updates of a tied matrix, often a third of a small model, would come last, when nothing is
    left to hide them. They begin first: only looked-up rows are updated again at the end.

    order: the parameters that get a gradient, in that order, and the dtype of each gradient.
    capacity: the most updates with one gradient.
    tied: the matrix whose gradient comes early (`TiedMatrix`).
    """

    def __init__(
        self,
        weights: Weights,
        order: dict[nn.Parameter, torch.dtype],
        capacity: int,
        tied: nn.Parameter | None,
    ) -> None:
        self._device = weights.device
        self._tied: _TiedGroup | None = None
        self._parts: list[_Part] = []
        self._group_of: dict[nn.Parameter, _Group] = {}
        kinds: dict[Any, list[nn.Parameter]] = {}
        for parameter, dtype in order.items():
            copied = weights.copies.of(parameter) is not None
            kind = (weights.copies.data_of(parameter).dtype, dtype, copied)
            kinds.setdefault(kind, []).append(parameter)
        for (_, dtype, _), own in kinds.items():
            part = _Part(weights, own, dtype, capacity, tied)
            self._parts.append(part)
            for group in part.groups:
                self._group_of |= dict.fromkeys(group.parameters, group)
                self._tied = group if isinstance(group, _TiedGroup) else self._tied
        self._rehearse()

    def _rehearse(self) -> None:
        """Launches every kernel with no update, so that all are compiled before the capture."""
        for part in self._parts:
            part.set_addresses([p.data_ptr() for p in part.parameters])  # as large as gradients
            part.set_num_steps(0)
        self.begin()
        if self._tied is not None:
            self._tied.begin(torch.zeros(1, dtype=torch.int64, device=self._device))
        for group in {id(g): g for g in self._group_of.values()}.values():
            group.launch()
        if self._tied is not None:
            self._tied.end()

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
        if self._tied is not None:
            self._tied.end()
        self._complete: tuple[Any, ...] | None = None

    def early(self, gradient: Tensor, ids: Tensor) -> None:
        """Begins the updates of the tied matrix: its gradient is complete but for the rows ids."""
        if self._tied is None:
            return
        self._complete = facts_when_complete(gradient)
        ids = ids.flatten().clone()  # on this stream, and kept: its memory is nobody else's then
        with self._beside(self._tied.stream):
            self._tied.begin(ids)

    def _beside(self, stream: torch.cuda.Stream) -> AbstractContextManager[None]:
        """A block on another stream, which waits for what there is on the present one."""
        stream.wait_stream(torch.cuda.current_stream(self._device))
        block: AbstractContextManager[None] = torch.cuda.stream(stream)
        return block

    def ready(self, parameter: nn.Parameter) -> None:
        """Notes that a parameter's gradient is complete; the last of a group launches the group."""
        group = self._group_of[parameter]
        gradient = _gradient(parameter)
        if group is self._tied and self._complete not in (None, facts(gradient)):
            raise RuntimeError("expected the gradient of a tied matrix as in the warm-up")
        group.addresses[parameter] = gradient.data_ptr()
        self._waiting[id(group)] -= 1
        if self._waiting[id(group)] > 0:
            return
        with self._beside(group.stream):
            group.launch()
            done = torch.cuda.Event()
            done.record()
        self._under_way.append((group, done))
        if len(self._under_way) > 2:
            self._finish_first()

    def _finish_first(self) -> None:
        group, done = self._under_way.pop(0)
        torch.cuda.current_stream(self._device).wait_event(done)
        for parameter in group.parameters:
            parameter.grad = None

    def join(self) -> None:
        while self._under_way:
            self._finish_first()
        if self._tied is not None and self._tied.is_begun:
            torch.cuda.current_stream(self._device).wait_stream(self._tied.stream)
            self._tied.end()

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
        tied: nn.Parameter | None,
    ) -> None:
        self.parameters = parameters
        self.weights = weights
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
            last = row + 1 == len(parameters) or parameters[row + 1] is tied
            elements += parameter.numel()
            if parameter is tied or last or elements >= GROUP_ELEMENTS:
                kind = _TiedGroup if parameter is tied else _Group
                self.groups.append(kind(self, range(first, row + 1)))
                first, elements = row + 1, 0

    def set_options(self, options: AdamOptions) -> None:
        if options != self.options:
            words = torch.tensor(options, dtype=torch.float64, device="cpu").view(torch.int64)
            self.record[:NUM_OPTIONS].copy_(words)
            self.options = options

    def arguments(self) -> tuple[Any, ...]:
        """Of every launch of updates."""
        capacity = self.coefficients.shape[1]
        return (
            self.record, self.coefficients, self.dtypes, capacity, self.stochastic, self.copies,
        )  # fmt: skip

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
        self.stream = update_stream(part.weights.device)
        self._part = part
        self._chunks = part.table.chunks_of(rows)

    def launch(self) -> None:
        part = self._part
        _kernels.adam_chunks_(part.table, self._chunks, *part.arguments())


class _TiedGroup(_Group):
    """The one matrix that is both embedding and last layer."""

    def __init__(self, part: _Part, rows: range) -> None:
        super().__init__(part, rows)
        self.stream = tied_stream(part.weights.device)
        self._row = rows.start
        self._rows: SavedRows | None = None

    @property
    def is_begun(self) -> bool:
        return self._rows is not None

    def begin(self, ids: Tensor) -> None:
        """Updates all rows, and saves the rows `ids` before: their gradients are incomplete."""
        [parameter] = self.parameters
        weights = self._part.weights
        matrices = (weights.copies.data_of(parameter), *weights.moments[parameter])
        self._rows = SavedRows(ids, *(m.index_select(0, ids) for m in matrices))
        super().launch()

    def launch(self) -> None:
        """Updates the saved rows; all of them, if none were saved."""
        if self._rows is None:
            super().launch()
        else:
            part = self._part
            _kernels.adam_rows_(part.table, self._row, self._rows, *part.arguments())

    def end(self) -> None:
        self._rows = None


def _gradient(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    if gradient is None or not same_layout(gradient, parameter):
        raise RuntimeError(
            f"expected a gradient laid out as its parameter of shape {tuple(parameter.shape)}"
        )
    return gradient
