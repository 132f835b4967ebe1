# SPDX-License-Identifier: Apache-2.0
"""Trained parameters, base values and Adam's moments at addresses that captured graphs know."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._checks import bytes_reached, has_memory
from .._tensors import DTYPES, HALVES, is_dense
from ..language_model.fused_modules import fused_head_weight
from ..language_model.loss import CausalLoss
from ..language_model.pass_copies import PassCopies, autocast_weights, narrowed_tensors
from ..native.torch_private import foreach_copy_, foreach_zero_
from ..optim import _kernels
from ..optim._record import NUM_OPTIONS, AdamOptions, TensorRow, flags_of
from ..optim._tensor_table import TensorTable, check_disjoint
from .capture_memory import NotCapturable
from .rounding import Rounding, moment_dtype


def adam_options(lr: float, betas: tuple[float, float], eps: float) -> AdamOptions:
    """The options of a record for `triton_kernels/adam.py`, without weight decay or clipping."""
    logs = (_kernels.log2(betas[0]), _kernels.log2(betas[1]))
    return AdamOptions(lr, *betas, *logs, eps)


class Weights:
    """Base values and Adam's moments of parameters on one CUDA device, for query after query.

    `save` copies the parameters before a query. `restore` puts them back with one launch for each
    dtype, which also resets Adam's state. Base values may lie in pinned host memory, where the
    kernel reads them.

    copies: the bfloat16 copies that passes read in place of some parameters.

    Raises NotCapturable for parameters that the kernels cannot take.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        host: bool,
        copies: PassCopies,
        rounding: Rounding,
    ) -> None:
        device = parameters[0].device
        for parameter in parameters:
            if parameter.dtype not in DTYPES or not is_dense(parameter):
                raise NotCapturable(
                    "parameters: expected dense ones of float64, float32, float16 or bfloat16, got "
                    f"{parameter.dtype} with strides {parameter.stride()}"
                )
            if parameter.device != device:
                raise NotCapturable(
                    f"parameters: expected one device, got {device} and {parameter.device}"
                )
        try:
            check_disjoint("parameters", parameters)
        except ValueError as error:
            raise NotCapturable(str(error)) from error
        self.parameters = list(parameters)
        self.device = device
        self.copies, self.rounding = copies, rounding
        self.base = [pinned_like(p) for p in parameters] if host else _like(parameters)
        pairs = zip(_moments(parameters), _moments(parameters), strict=True)
        self.moments = dict(zip(parameters, pairs, strict=True))
        steps = torch.empty(len(parameters), dtype=torch.float32, device=device)
        self.steps = dict(zip(parameters, steps.unbind(), strict=True))
        self._data = [p.data for p in parameters]
        self._addresses = [data.data_ptr() for data in self._data]
        self._all_steps = steps
        self._reset()
        base = dict(zip(parameters, self.base, strict=True))
        self._restoring = []
        for dtype, own in by_dtype(parameters).items():
            table = self.table(own)
            addresses = [base[parameter].data_ptr() for parameter in own]
            no_options = AdamOptions(*[0.0] * NUM_OPTIONS)  # the kernel reads addresses only
            record = table.record(addresses, no_options)
            self._restoring.append((table, record, dtype))

    def table(self, parameters: Sequence[nn.Parameter]) -> TensorTable:
        """Rows for parameters of one dtype."""
        rows = []
        for p in parameters:
            exp_avg, exp_avg_sq = self.moments[p]
            rows.append(
                TensorRow(
                    param=self.copies.data_of(p).data_ptr(),
                    state1=exp_avg.data_ptr(),
                    state2=exp_avg_sq.data_ptr(),
                    step=self.steps[p].data_ptr(),
                    numel=p.numel(),
                    flags=flags_of(self.rounding.salts[id(p)]),
                )
            )
        return TensorTable(rows, self.device, triton=True)

    def _reset(self) -> None:
        foreach_zero_([moment for pair in self.moments.values() for moment in pair])
        self._all_steps.zero_()
        self._fresh = True  # whether moments and step counters are 0

    def save(self) -> None:
        if not self._fresh:  # the latest query was kept, not restored
            self._reset()
        self._fresh = False
        with torch.no_grad():
            foreach_copy_(self.base, self._data)

    def restore(self) -> None:
        """Puts base values back and resets Adam's state. May be cut short and begun again."""
        if [data.data_ptr() for data in self._data] == self._addresses:
            for table, record, dtype in self._restoring:
                _kernels.restore_(table, record, dtype)
            self._fresh = True
        else:  # the block freed memory of parameters, as FSDP does; the next query records anew
            for data, base in zip(self._data, self.base, strict=True):
                if not has_memory(data):
                    data.untyped_storage().resize_(bytes_reached(data))
                data.copy_(base)
        torch.autograd.graph.increment_version(self.parameters)


def by_dtype(parameters: Sequence[nn.Parameter]) -> dict[torch.dtype, list[nn.Parameter]]:
    parts: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        parts.setdefault(parameter.dtype, []).append(parameter)
    return parts


def _moments(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [
        tensor.view(moment_dtype(tensor.dtype)) if tensor.dtype in HALVES else tensor
        for tensor in _like(parameters)
    ]


def _like(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Uninitialised tensors laid out as the parameters, side by side in memory.

    As separate blocks of the allocator they would take some percent more.
    """
    found: dict[nn.Parameter, Tensor] = {}
    for dtype, own in by_dtype(parameters).items():
        aligned = 512 // dtype.itemsize
        sizes = [-(-p.numel() // aligned) * aligned for p in own]
        memory = torch.empty(sum(sizes), dtype=dtype, device=own[0].device)
        for parameter, stretch in zip(own, torch.split(memory, sizes), strict=True):
            found[parameter] = stretch.as_strided(
                parameter.shape, parameter.stride(), stretch.storage_offset()
            )
    return [found[parameter] for parameter in parameters]


def pinned_like(parameter: Tensor) -> Tensor:
    """Host memory laid out as the parameter. It is pinned, so that the device can read it."""
    return torch.empty_strided(
        parameter.shape, parameter.stride(), dtype=parameter.dtype, device="cpu", pin_memory=True
    )


def pass_copies(model: nn.Module, loss_of: CausalLoss) -> PassCopies:
    """The copies that captured passes read: narrowed tensors, and weights that autocast would cast.

    The last layer's weight stays in place where the loss multiplies with it, since its gradient is
    summed in float32.
    """
    narrowed = narrowed_tensors(model)
    if not loss_of.autocast or loss_of.compiled:  # the compiler fuses casts with what reads them
        return PassCopies(narrowed)
    head = fused_head_weight(model) if loss_of.fuses else None
    replaced = dict.fromkeys((*narrowed, *autocast_weights(model)))
    if head is None or head.dtype is not torch.float32:
        return PassCopies(replaced)
    replaced.pop(head, None)
    return PassCopies(replaced, [head])
