# SPDX-License-Identifier: Apache-2.0
"""What captured passes ask of Adam's kernels: a limit told later, a mark for what is not finite,
and the way back. In Triton's interpreter where there is no GPU."""

from __future__ import annotations

import math

import pytest
import torch
from hullkit import optim
from hullkit.finetune.base_weights import adam_options
from hullkit.finetune.capture_memory import HeldTensors
from hullkit.finetune.padding import ALONE, TOGETHER, bucket
from hullkit.optim import _kernels
from hullkit.optim._record import BROKEN, LIMIT, TensorRow
from hullkit.optim._tensor_table import TensorTable
from torch import Tensor, nn

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []  # there they run on it
CAPACITY = 4
SIZES = (5, 8192 + 512 + 3, 1)


class Updates:
    """Parameters with moments, and a record as a graph reads it."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        make = [torch.randn(size, generator=generator) for size in SIZES]
        self.params = [nn.Parameter(values.to(DEVICE, dtype)) for values in make]
        self.grads = [(0.1 * values).to(DEVICE, dtype) for values in make]
        self.moments = [(torch.zeros_like(p.data), torch.zeros_like(p.data)) for p in self.params]
        self.steps = torch.zeros(len(SIZES), device=DEVICE)
        rows = [
            TensorRow(p.data_ptr(), m.data_ptr(), v.data_ptr(), step.data_ptr(), p.numel())
            for p, (m, v), step in zip(self.params, self.moments, self.steps, strict=True)
        ]
        self.table = TensorTable(rows, DEVICE, triton=True)
        options = adam_options(1e-2, (0.9, 0.999), 1e-8)
        self.record = self.table.record([g.data_ptr() for g in self.grads], options).clone()
        self.dtype = dtype

    def run(self, limit: int) -> None:
        self.record[LIMIT] = limit
        self.record[BROKEN] = 0
        math_dtype = _kernels.arithmetic_dtype(self.dtype)
        coefficients = torch.zeros(len(SIZES), CAPACITY, 2, dtype=math_dtype, device=DEVICE)
        _kernels.adam_coefficients_(self.table, self.record, coefficients, CAPACITY)
        for rows in (range(0, 1), range(1, 3)):  # two groups
            _kernels.adam_chunks_(
                self.table, self.table.chunks_of(rows), self.record, coefficients,
                (self.dtype,) * 3, CAPACITY, False,
            )  # fmt: skip

    def state(self) -> list[Tensor]:
        moments = [moment for pair in self.moments for moment in pair]
        return [t.detach().clone() for t in (*self.params, *moments, self.steps)]


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_limited_updates_are_as_many_steps(limit: int) -> None:
    updates, other = Updates(), Updates()
    before = updates.state()
    updates.run(limit)
    assert int(updates.record[BROKEN]) == 0
    assert updates.steps.tolist() == [limit] * len(SIZES)
    if limit == 0:
        assert all(map(torch.equal, updates.state(), before))
        return
    optimizer = optim.Adam(other.params, lr=1e-2, backend="triton")
    for param, grad in zip(other.params, other.grads, strict=True):
        param.grad = grad
    optimizer.step(num_steps=limit)
    for mine, theirs in zip(updates.params, other.params, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("tensor", "element"), [(0, 4), (1, 17), (1, 8192 + 514), (2, 0)])
def test_a_gradient_that_is_not_finite_is_marked(value: float, tensor: int, element: int) -> None:
    updates = Updates()
    updates.grads[tensor][element] = value
    updates.run(1)
    assert int(updates.record[BROKEN]) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_restoring(dtype: torch.dtype) -> None:
    """To the bits, signalling NaN and -0 among them; moments and counters are 0 again."""
    updates = Updates(dtype)
    base = [param.detach().clone() for param in updates.params]
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    base[1].view(integer)[:2] = torch.tensor(
        [torch.iinfo(integer).max - 5, torch.iinfo(integer).min]
    )
    updates.run(2)
    record = updates.table.record([b.data_ptr() for b in base], (0.0,) * 10)
    _kernels.restore_(updates.table, record, dtype)
    for param, wanted in zip(updates.params, base, strict=True):
        assert torch.equal(param.detach().view(integer), wanted.view(integer))
    assert all(not bool(moment.any()) for pair in updates.moments for moment in pair)
    assert updates.steps.tolist() == [0.0] * len(SIZES)


def test_buckets() -> None:
    lengths = (2, 16, 17, 32, 33, 400, 512, 513, 1000, 1024, 1025)
    assert [bucket(n, 4096, ALONE) for n in lengths] == [
        32, 32, 32, 32, 64, 416, 512, 576, 1024, 1024, 1152,
    ]  # fmt: skip
    assert [bucket(n, 4096, TOGETHER) for n in lengths] == [
        16, 16, 32, 32, 48, 400, 512, 544, 1024, 1024, 1088,
    ]  # fmt: skip
    for count in (ALONE, TOGETHER):
        assert bucket(1000, 1000, count) == 1000  # no further than the model's positions
        assert bucket(40, 0, count) == 40
        for n in range(2, 3000):
            length = bucket(n, 1 << 20, count)
            assert n <= length <= max(n + 256 // count - 1, n + n // count)
        assert len({bucket(n, 1 << 20, count) for n in range(257, 513)}) == count


def test_what_a_warm_up_keeps_off_the_device() -> None:
    """Counted once each, the model's own tensors not at all; gradients are as ever."""
    torch.manual_seed(0)
    frozen, trained = nn.Linear(8, 16, bias=False).requires_grad_(False), nn.Linear(16, 4)
    model = nn.Sequential(nn.BatchNorm1d(8).eval(), frozen, trained)
    x = torch.randn(5, 8, requires_grad=True)  # so that frozen.weight is saved too

    def run() -> None:
        hidden = torch.tanh(model[:2](x))  # saved by tanh and by the next layer
        loss = model[2](hidden).square().sum()  # square saves what it squares
        loss.backward()

    run()
    wanted = [p.grad for p in model.parameters() if p.grad is not None]
    for parameter in model.parameters():
        parameter.grad = None
    held = HeldTensors(model, room=0, most=None)
    with held.hooks():
        run()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(map(torch.equal, grads, wanted))
    floats = x.numel() + 5 * 16 + 5 * 4  # batch norm saves its input, too
    assert floats * 4 <= held.num_bytes <= (floats + 2 * 8) * 4
