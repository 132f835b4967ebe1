# SPDX-License-Identifier: Apache-2.0
"""Adam's updates of one captured pass, beside its backward half."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .._tensors import HALVES, same_layout
from ..language_model.products import WeightProducts
from ..optim import _kernels
from ..optim._products import (
    adam_product_chunks_,
    aligned,
    factors_of,
    product_chunks,
    takes_products,
)
from ..optim._record import (
    BROKEN,
    HEAD,
    LIMIT,
    NUM_OPTIONS,
    SEED,
    AdamOptions,
    ProductFactors,
)
from .base_weights import Weights
from .capture_memory import Gradient, update_stream
from .rounding import moment_dtype

# Elements whose updates are launched together: enough to fill a GPU, few enough to begin early.
# Gradients that are products wait without taking memory, and more tiles spread more evenly.
GROUP_ELEMENTS, PRODUCT_ELEMENTS = 2 << 20, 8 << 20


class GroupedUpdates(WeightProducts):
    """Adam's updates of one captured pass, in groups that start when their gradients are ready.

    They run on a stream of their own. The gaps of the backward pass hide about a tenth of them;
    not more, since both want the memory. A gradient lives until its update. The backward pass waits
    for the group before last, so that few gradients exist together. A gradient that is one linear
    layer's product never exists: its two factors live until its update. Two kinds start when the
    backward pass has ended: all gradients with `together`, and groups with a gradient of an adapter
    that may be written at any time until then.

    order: the parameters that get a gradient, in that order, and their gradients.
    capacity: the most updates with one gradient.
    together: whether all gradients that are no products may exist together. Updates beside the
        backward pass take multiprocessors from its kernels, which pays only where it saves memory.
    """

    def __init__(
        self,
        weights: Weights,
        order: dict[nn.Parameter, Gradient],
        capacity: int,
        together: bool,
    ) -> None:
        self._side = update_stream(weights.device)
        self._parts: list[_Part] = []
        self._group_of: dict[nn.Parameter, _Group] = {}
        self._taken = {p for p, gradient in order.items() if gradient.is_taken}
        kinds: dict[Any, list[nn.Parameter]] = {}
        for parameter, gradient in order.items():
            data, copy = weights.copies.data_of(parameter), weights.copies.of(parameter)
            fuses = gradient.is_product and takes_products(data, weights.moments[parameter], copy)
            kind = (data.dtype, gradient.dtype, copy is not None, fuses)
            kinds.setdefault(kind, []).append(parameter)
        for (_, dtype, _, fuses), own in kinds.items():
            least = PRODUCT_ELEMENTS if fuses else math.inf if together else GROUP_ELEMENTS
            part = (_ProductPart if fuses else _Part)(weights, own, dtype, capacity, least)
            self._parts.append(part)
            for group in part.groups:
                self._group_of |= dict.fromkeys(group.parameters, group)
        self._rehearse()

    def _rehearse(self) -> None:
        """Launches kernels with no update, so that none is compiled in the capture."""
        for part in self._parts:
            part.set_num_steps(0)
        self.begin()
        for part in self._parts:
            part.rehearse()

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
        self._last: set[int] = set()  # groups that start at the end, by id
        self._late: list[_Group] = []
        for part in self._parts:
            part.record[BROKEN].zero_()
            part.move_on()

    def ready(self, parameter: nn.Parameter) -> None:
        """Notes that a parameter's gradient is complete; the last of a group launches the group."""
        group = self._group_of[parameter]
        if parameter.grad is None and parameter in group.part.gradients:
            return  # autograd tells of a gradient that was taken, too
        self._check_first(parameter, group)
        group.part.note(parameter, _gradient(parameter))
        self._note(group)

    def take(self, weight: Tensor, a: Tensor, b: Tensor) -> bool:
        """Notes a weight's gradient as `ready` does, if it is updated without one."""
        group = self._group_of.get(weight)  # type: ignore[call-overload]
        if group is None or not isinstance(group.part, _ProductPart):
            return False
        self._check_first(weight, group)
        group.held += [(t, t._version) for t in group.part.note_factors(weight, a, b)]
        self._note(group)
        return True

    def take_gradient(self, factor: Tensor, gradient: Tensor) -> bool:
        """Notes a gradient as `ready` does; the factor's group starts at the end of the pass."""
        if factor not in self._taken:
            return False
        group = self._group_of[factor]  # type: ignore[index]
        self._check_first(factor, group)
        group.part.note(factor, gradient)  # type: ignore[arg-type]
        group.taken.append(gradient)
        self._last.add(id(group))
        self._note(group)
        return True

    def _check_first(self, parameter: Tensor, group: _Group) -> None:
        if parameter in group.part.gradients:
            raise RuntimeError(
                f"expected one gradient of a parameter of shape {tuple(parameter.shape)}, as in "
                "the warm-up, got another one"
            )

    def _note(self, group: _Group) -> None:
        self._waiting[id(group)] -= 1
        if self._waiting[id(group)] > 0:
            return
        if id(group) in self._last:
            self._late.append(group)
        else:
            self._start(group)

    def _start(self, group: _Group) -> None:
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
        if any(factor._version != version for factor, version in group.held):
            raise RuntimeError(
                "expected gradients and activations that nobody writes to in the backward pass, "
                "got one that was written to before its weight's update"
            )
        group.held.clear()
        group.taken.clear()
        for parameter in group.parameters:
            parameter.grad = None

    def join(self) -> None:
        while self._late:
            self._start(self._late.pop(0))
        while self._under_way:
            self._finish_first()

    def broken(self) -> Tensor:
        """[] int64, 0 if all gradients were finite."""
        return torch.stack([part.record[BROKEN] for part in self._parts]).amax()

    # After the capture.

    def set_gradients(self) -> None:
        """Tells the kernels where the captured pass has its gradients."""
        for part in self._parts:
            for parameter in part.parameters:
                if parameter not in part.gradients:
                    raise RuntimeError(
                        f"expected a gradient of a parameter of shape {tuple(parameter.shape)}, as "
                        "in the warm-up, got none"
                    )
            part.set_gradients()


class _Part:
    """Parameters with one dtype, gradients with one dtype, and copies for all of them or none.

    least: a group is as small as it can be with so many elements.
    """

    def __init__(
        self,
        weights: Weights,
        parameters: list[nn.Parameter],
        grad_dtype: torch.dtype,
        capacity: int,
        least: float,
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
        self.gradients: dict[Tensor, Any] = {}  # where the captured pass has them
        first = elements = 0
        for row, parameter in enumerate(parameters):
            elements += parameter.numel()
            if elements >= least or row == len(parameters) - 1:
                self.groups.append(_Group(self, range(first, row + 1)))
                first, elements = row + 1, 0

    def set_options(self, options: AdamOptions) -> None:
        if options != self.options:
            words = torch.tensor(options, dtype=torch.float64, device="cpu").view(torch.int64)
            self.record[:NUM_OPTIONS].copy_(words)
            self.options = options

    def set_num_steps(self, num_steps: int) -> None:
        self.record[LIMIT].fill_(num_steps)

    def move_on(self) -> None:
        capacity = self.coefficients.shape[1]
        _kernels.adam_coefficients_(self.table, self.record, self.coefficients, capacity)

    # What a part whose gradients are products does otherwise.

    def chunks_of(self, rows: range) -> Tensor:
        return self.table.chunks_of(rows)

    def rehearse(self) -> None:
        """Launches a kernel that is compiled when it is first launched."""
        self._set([p.data_ptr() for p in self.parameters])  # as large as gradients
        for group in self.groups:
            group.launch()

    def launch(self, chunks: Tensor) -> None:
        _kernels.adam_chunks_(
            self.table, chunks, self.record, self.coefficients, self.dtypes,
            self.coefficients.shape[1], self.stochastic, self.copies,
        )  # fmt: skip

    def note(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        self.gradients[parameter] = gradient.data_ptr()

    def set_gradients(self) -> None:
        self._set([self.gradients[p] for p in self.parameters])

    def _set(self, addresses: list[int]) -> None:
        self.record[HEAD:].copy_(torch.tensor(addresses, dtype=torch.int64, device="cpu"))


class _ProductPart(_Part):
    """Parameters whose gradients are products that their updates compute."""

    def __init__(self, weights: Weights, *others: Any) -> None:
        super().__init__(weights, *others)
        size = (len(self.parameters), len(ProductFactors._fields))
        self._factors = torch.zeros(size, dtype=torch.int64, device=weights.device)

    def chunks_of(self, rows: range) -> Tensor:
        shapes = [tuple(p.shape) for p in self.parameters[rows.start : rows.stop]]
        return product_chunks(shapes, rows.start, self.table.device)

    def rehearse(self) -> None:
        """Nothing: its kernel is compiled already."""

    def launch(self, chunks: Tensor) -> None:
        adam_product_chunks_(
            self.table, chunks, self._factors, self.record, self.coefficients, self.dtypes[0],
            self.stochastic, self.copies,
        )  # fmt: skip

    def note(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        raise RuntimeError(
            f"expected a gradient of shape {tuple(parameter.shape)} to be a linear layer's product "
            "again, as in the warm-up, got another"
        )

    def note_factors(self, weight: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
        """Returns what must live until the update: memory, and no graph of autograd."""
        held = [aligned(factor.detach()) for factor in (a, b)]
        self.gradients[weight] = factors_of(*held)
        return held

    def set_gradients(self) -> None:
        factors = [self.gradients[p] for p in self.parameters]
        self._factors.copy_(torch.tensor(factors, dtype=torch.int64, device="cpu"))


class _Group:
    """Neighbouring rows of a table, updated by one launch."""

    def __init__(self, part: _Part, rows: range) -> None:
        self.part = part
        self.parameters = part.parameters[rows.start : rows.stop]
        self.held: list[tuple[Tensor, int]] = []  # factors and their versions, until the update
        self.taken: list[Tensor] = []  # gradients that autograd does not have, until the update
        self._chunks = part.chunks_of(rows)

    def launch(self) -> None:
        self.part.launch(self._chunks)


def _gradient(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    if gradient is None or not same_layout(gradient, parameter):
        raise RuntimeError(
            f"expected a gradient laid out as its parameter of shape {tuple(parameter.shape)}"
        )
    return gradient
