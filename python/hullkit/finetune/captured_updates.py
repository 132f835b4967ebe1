"""Captured updates: recorded group by group, beside the backward pass."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..optim import _kernels
from ..optim._record import BROKEN, HEAD, LIMIT, NUM_OPTIONS, SEED, AdamOptions
from ..optim._tensor_table import HALVES, same_layout
from .base_weights import Weights
from .rounding import moment_dtype

# Elements whose updates are launched together: enough to fill a GPU, few enough to begin early.
GROUP_ELEMENTS = 2 << 20


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
        self._side = side_stream(weights.device)
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


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of updates. There is one for all models: torch keeps memory for every stream."""
    return torch.cuda.Stream(device)


def _gradient(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    if gradient is None or not same_layout(gradient, parameter):
        raise RuntimeError(
            f"expected a gradient laid out as its parameter of shape {tuple(parameter.shape)}"
        )
    return gradient
