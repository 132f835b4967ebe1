# SPDX-License-Identifier: Apache-2.0
"""Operators and functions with tensors of any shape, strides, dtype and memory, in any order.

A call is refused by name, or its results are what the operation promises. No call ends the process.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import hullkit
import pytest
import torch
from _cases import machine
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from torch import Tensor

REFUSALS = (ValueError, TypeError, NotImplementedError, RuntimeError)
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DTYPES = [*FLOATS, torch.int64, torch.int32, torch.bool, torch.complex64]
ODD = [0.0, -0.0, 1e-45, 1e-310, 3e38, 1e300, float("nan"), float("inf"), -float("inf")]
NAMES = ["lmo", "knn", "duplicates", "frank_wolfe", "select", "sift", "round_multiplicities"]
NAMES += ["apportion"]

sizes = st.lists(st.integers(0, 9), max_size=4)
integers = st.one_of(st.integers(-2, 12), st.sampled_from([2**31, 2**40, 2**62, -(2**63)]))
picks = st.integers(0, 29)
numbers = st.one_of(st.sampled_from(ODD), st.floats(0, 2))


def whole(tensor: Tensor) -> bool:
    """Whether the storage holds every element still."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    end = tensor.storage_offset() + last + 1
    return end * tensor.element_size() <= tensor.untyped_storage().nbytes()


class AnyCalls(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.made = [torch.zeros(())]  # no Bundle: a report would print memory that was taken away

    def pick(self, number: int) -> Tensor:
        return self.made[number % len(self.made)]

    @rule(shape=sizes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
    def make(self, shape: list[int], dtype: torch.dtype, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.made.append(torch.randint(-2, 7, shape, generator=generator).to(dtype))

    @rule(n=st.integers(1, 9), d=st.integers(1, 9), dtype=st.sampled_from(FLOATS))
    def make_pool(self, n: int, d: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(n * d)
        self.made.append(torch.randn(n, d, generator=generator).to(dtype))

    @rule(number=picks, value=numbers)
    def poison(self, number: int, value: float) -> None:
        tensor = self.pick(number)
        if tensor.is_floating_point() and tensor.numel() and whole(tensor):
            # A conversion, since an assignment refuses what overflows.
            tensor[(-1,) * tensor.ndim] = torch.tensor(value).double().to(tensor.dtype)

    @rule(number=picks, way=st.sampled_from(["T", "row", "skip", "more"]))
    def view(self, number: int, way: str) -> None:
        tensor = self.pick(number)
        if not whole(tensor) or tensor.ndim == 0:  # torch refuses to look at what was cut
            return
        if way == "T" and tensor.ndim >= 2:
            self.made.append(tensor.mT)
        elif way == "row" and len(tensor):
            self.made.append(tensor[-1])
        elif way == "skip":
            self.made.append(tensor[..., ::2])
        elif way == "more" and tensor.ndim < 4:
            self.made.append(tensor.expand(3, *tensor.shape))

    @rule(number=picks, size=st.integers(0, 64))
    def take_memory_away(self, number: int, size: int) -> None:
        storage = self.pick(number).untyped_storage()
        if storage.nbytes() > size:
            storage.resize_(size)

    @rule(name=st.sampled_from(NAMES), data=st.data())
    def call_operator(self, name: str, data: st.DataObject) -> None:
        operator = getattr(torch.ops.hullkit, name).default
        arguments: list[Any] = []
        for argument in operator._schema.arguments:
            kind = str(argument.type)
            if "Tensor" not in kind:
                arguments.append(data.draw(numbers if kind == "float" else integers))
            elif "Optional" in kind and data.draw(st.booleans()):
                arguments.append(None)
            else:
                arguments.append(self.pick(data.draw(picks)))
        with suppress(*REFUSALS):
            operator(*arguments)

    @rule(
        name=st.sampled_from(["lmo", "knn", "frank_wolfe", "sift", "select"]),
        shape=st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 9)),
        dtype=st.sampled_from(FLOATS),
        number=integers,
        value=st.one_of(st.none(), numbers),
        lengths=st.one_of(st.none(), st.integers(-1, 10)),
    )
    def call_function(
        self,
        name: str,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        number: int,
        value: float | None,
        lengths: int | None,
    ) -> None:
        batch, n, d = shape
        pool = torch.randn(n, d, generator=torch.Generator().manual_seed(n)).to(dtype)
        query = torch.randn(batch, d, generator=torch.Generator().manual_seed(d)).to(dtype)
        if value is not None and pool.numel():
            pool.view(-1)[number % pool.numel()] = torch.tensor(value).double().to(dtype)
        options: dict[str, Any] = {}
        if lengths is not None:
            options["lengths"] = torch.full((batch,), lengths)
        most = min(number, 50)  # so many outputs; the rest are refused
        extra = {"knn": [most], "sift": [most], "select": [most]}.get(name, [])
        try:
            result = getattr(hullkit, name)(pool, query, *extra, **options)
        except REFUSALS:
            return
        indices = result.index if name == "lmo" else result.indices
        valid = n if lengths is None else lengths
        assert ((indices >= -1) & (indices < valid)).all()
        if name == "select":
            assert (result.counts.sum(-1) == most).all()
        if name == "frank_wolfe":
            assert ((result.weights.sum(-1) - 1).abs() < 1e-9).all()


AnyCalls.TestCase.settings = machine(40, 30)
TestAnyCalls = pytest.mark.plain_memory(AnyCalls.TestCase)
