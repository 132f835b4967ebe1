# SPDX-License-Identifier: Apache-2.0
"""Parameter lists, and the ways to run an optimizer that every test of one takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from hullkit import optim
from torch import Tensor, nn


class Way(NamedTuple):
    """Where tensors live and which kernels update them."""

    device: str
    backend: str | None


WAYS = [
    pytest.param(Way("cpu", None), id="core"),
    pytest.param(
        Way("cpu", "triton"),
        id="interpreter",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here"),
    ),
    pytest.param(Way("cuda", None), id="cuda", marks=pytest.mark.gpu),
]


def _runs() -> list[Any]:
    """(way, number of updates in each of 20 calls). The interpreter is slow: one mixed run."""
    runs = []
    for way in WAYS:
        (where,) = way.values
        if where.backend == "triton":
            runs.append(
                pytest.param(where, [1, 2, 3, 5, 8] * 4, id=f"{way.id}-mixed", marks=way.marks)
            )
        else:
            runs += [
                pytest.param(where, [k] * 20, id=f"{way.id}-{k}", marks=way.marks)
                for k in (1, 2, 3, 5, 8)
            ]
    return runs


RUNS = _runs()

# (ours, torch's, options)
KINDS: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "adam": (optim.Adam, torch.optim.Adam, {}),
    "adam-l2-maximize": (
        optim.Adam,
        torch.optim.Adam,
        {"weight_decay": 0.1, "maximize": True, "betas": (0.8, 0.95), "eps": 1e-6},
    ),
    "adam-no-momentum": (optim.Adam, torch.optim.Adam, {"betas": (0.0, 0.9)}),
    "adamw": (optim.AdamW, torch.optim.AdamW, {"lr": 1e-2}),
    "sgd": (optim.SGD, torch.optim.SGD, {"lr": 0.1}),
    "sgd-dampened": (
        optim.SGD,
        torch.optim.SGD,
        {"lr": 0.01, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "maximize": True},
    ),
    "sgd-nesterov": (
        optim.SGD,
        torch.optim.SGD,
        {"lr": 0.01, "momentum": 0.8, "nesterov": True},
    ),
}


def gpt2_shapes(width: int) -> list[tuple[int, ...]]:
    """The 148 tensors of GPT-2 small, 768 channels made `width`."""
    block = [
        *[(width,)] * 2,
        *[(width, 3 * width), (3 * width,), (width, width), (width,)],
        *[(width,)] * 2,
        *[(width, 4 * width), (4 * width,), (4 * width, width), (width,)],
    ]
    return [
        (50257 * width // 768, width),
        (1024 * width // 768, width),
        *block * 12,
        (width,),
        (width,),
    ]


ODD_SHAPES = [(), (1,), (63,), (129,), (151,), (1000,), (0,), (7, 9), (33, 65), (1, 1, 5, 1)]


def odd_tensors(dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor]:
    """Odd shapes; unaligned; transposed; channels last."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    tensors = [normal(*shape) for shape in ODD_SHAPES]
    tensors.append(normal(2048 + 5)[1:])
    tensors.append(normal(40, 30).t())
    tensors.append(normal(2, 3, 8, 5).to(memory_format=torch.channels_last))
    return tensors


def parameters(tensors: Sequence[Tensor]) -> list[nn.Parameter]:
    """Copies that keep layout and alignment."""
    copies = []
    for tensor in tensors:
        offset = tensor.data_ptr() % 16 // tensor.element_size()
        stretch = torch.zeros(tensor.numel() + offset, dtype=tensor.dtype, device=tensor.device)
        copy = stretch[offset:].as_strided(tensor.shape, tensor.stride())
        copies.append(nn.Parameter(copy.copy_(tensor)))
    return copies


@triton.jit
def _fma_kernel(out, factor, summand):
    factor = tl.load(factor)
    tl.store(out, tl.fma(factor, factor, tl.load(summand)))


def interpreter_fuses() -> bool:
    """Whether `tl.fma` rounds once there, as it does on a GPU."""
    factor = torch.tensor([1 + 2.0**-12])
    out = torch.empty_like(factor)
    _fma_kernel[(1,)](out, factor, -factor * factor)
    return bool(out != 0)  # what the product lost when it was rounded


def set_grads(lists: Sequence[Sequence[Tensor]], seed: int) -> None:
    """The same new gradients for every list."""
    generator = torch.Generator().manual_seed(seed)
    for alike in zip(*lists, strict=True):
        grad = torch.randn(alike[0].shape, generator=generator, dtype=torch.float64)
        for param in alike:
            param.grad = torch.empty_like(param).copy_(grad)


def relative_error(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest difference, relative to the element or, for small ones, to the rms of all."""
    first = torch.cat([t.detach().double().flatten() for t in got])
    second = torch.cat([t.detach().double().flatten() for t in wanted])
    scale = torch.maximum(second.abs(), second.square().mean().sqrt())
    return float(((first - second).abs() / scale).max())


def state_tensors(optimizer: Any, params: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """Parameters and state, by name."""
    tensors: dict[str, list[Tensor]] = {"param": [param.detach() for param in params]}
    for param in params:
        for name, value in optimizer.state.get(param, {}).items():
            if value is not None:
                tensors.setdefault(name, []).append(value)
    return tensors


def check_equal(
    ours: Any, params: Sequence[Tensor], theirs: Any, others: Any, bound: float
) -> None:
    """Parameters and state agree within `bound`, step counters exactly."""
    got, wanted = state_tensors(ours, params), state_tensors(theirs, others)
    assert got.keys() == wanted.keys()
    for name, tensors in wanted.items():
        assert [t.dtype for t in got[name]] == [t.dtype for t in tensors], name
        if name == "step":
            assert [t.item() for t in got[name]] == [t.item() for t in tensors]
        else:
            assert relative_error(got[name], tensors) <= bound, name


def equal_bits(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
