# SPDX-License-Identifier: Apache-2.0
"""accumulate_ against the oracle, and the global norm it returns."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from _optim import WAYS, Way, odd_tensors, parameters
from hullkit import reference
from hullkit.optim import _layouts, accumulate, accumulate_


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_equals_oracle(dtype: torch.dtype, way: Way) -> None:
    into = [p.detach() for p in parameters(odd_tensors(torch.float32, way.device))]
    grads = odd_tensors(dtype, way.device, seed=1)
    wanted: list[Any] = [tensor.double().cpu().numpy() for tensor in into]
    for weight in (1.0, 0.3, -2.0):
        norm = accumulate_(into, grads, weight, norm=True, backend=way.backend)
        wanted = [
            reference.accumulate(a, g.double().cpu().numpy(), weight)
            for a, g in zip(wanted, grads, strict=True)
        ]
    for got, exact in zip(into, wanted, strict=True):
        np.testing.assert_allclose(got.cpu().numpy(), exact, rtol=1e-6, atol=1e-6)
    assert norm is not None
    assert norm.item() == pytest.approx(reference.global_norm(wanted), rel=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_exact_where_float32_is(way: Way) -> None:
    into = [torch.zeros(9000, device=way.device), torch.zeros(3, 5, device=way.device).t()]
    grads = [torch.full((9000,), 0.5, device=way.device), torch.ones(5, 3, device=way.device)]
    norm = accumulate_(into, grads, 2.0, norm=True, backend=way.backend)
    assert norm is not None
    assert norm.item() == 9015**0.5 or abs(norm.item() - (9000 + 15 * 4) ** 0.5) < 1e-9
    assert torch.equal(into[0], torch.ones(9000, device=way.device))
    assert torch.equal(into[1], torch.full((5, 3), 2.0, device=way.device))


def test_missing_gradients_and_empty_lists() -> None:
    into = [torch.ones(3), torch.ones(2)]
    assert accumulate_(into, [None, torch.ones(2)], 0.5) is None
    assert into[0].tolist() == [1.0] * 3
    assert into[1].tolist() == [1.5] * 2
    norm = accumulate_([], [], norm=True)
    assert norm is not None
    assert norm.item() == 0.0


def test_same_address_other_size() -> None:
    """Views that begin alike are different lists."""
    whole = torch.zeros(100)
    for size in (10, 100, 50):
        accumulate_([whole[:size]], [torch.ones(size)])
    assert whole.tolist() == [3.0] * 10 + [2.0] * 40 + [1.0] * 50


def test_many_lists_in_turn() -> None:
    """More than are remembered."""
    lists = [[torch.zeros(5)] for _ in range(20)]
    for _ in range(2):
        for into in lists:
            accumulate_(into, [torch.ones(5)], 0.5)
    assert all(torch.equal(into[0], torch.ones(5)) for into in lists)


def test_same_bits_on_two_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(n, generator=generator) for n in (1, 70_001, 12)]
    results, norms = [], []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        into = [tensor.clone() for tensor in start]
        norms.append(accumulate_(into, start, 0.7, norm=True))
        results.append(into)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(*norms)


def test_threads_with_the_same_accumulators() -> None:
    """Sums may be lost, as with torch, but nothing is added that no thread has given."""
    into = [torch.zeros(5) for _ in range(3)]
    threads, calls = 4, 2000

    def run() -> None:
        own = [[torch.empty(5) for _ in into] for _ in range(7)]
        for call in range(calls):
            grads = own[call % 7]
            for grad in grads:
                grad.fill_(1.0)
            accumulate_(into, grads)
            for grad in grads:
                grad.fill_(float("nan"))  # nobody reads it any more

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(threads) as pool:
            for future in [pool.submit(run) for _ in range(threads)]:
                future.result()
    finally:
        sys.setswitchinterval(before)
    for tensor in into:
        assert bool((tensor == tensor.round()).all())
        assert 1 <= tensor.min() <= tensor.max() <= threads * calls


@pytest.mark.parametrize("plain", [False, True], ids=["this torch", "older torch"])
def test_a_signal_handler_may_accumulate(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At whichever instruction it comes: it does not wait for the call below; no sum is lost."""
    if plain:
        monkeypatch.setattr(_layouts, "_exchange", None)
    accumulate._known.clear()
    into, own, others = torch.zeros(2), torch.ones(2), torch.full((2,), 100.0)
    names = {"accumulate_", "addresses", "record", "_remember"}
    expected, place, comes = 0.0, 0, True

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code.co_name not in names:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            instructions.append(event)
            if len(instructions) == place:
                sys.settrace(None)
                accumulate_([into], [others])
        return trace

    before = sys.gettrace()
    while comes:
        instructions: list[str] = []
        place += 1
        sys.settrace(trace)
        try:
            accumulate_([into], [own])
        finally:
            sys.settrace(before)
        comes = len(instructions) == place
        accumulate_([into], [others])
        expected += 201 if comes else 101
        assert into.tolist() == [expected] * 2, place
    assert place > 100


def test_version_counters_move() -> None:
    into = [torch.zeros(3)]
    before = into[0]._version
    accumulate_(into, [torch.ones(3)])
    assert into[0]._version > before


def test_weights_of_numpy() -> None:
    for weight in (np.float32(0.5), np.float64(0.5)):
        into = torch.ones(2)
        accumulate_([into], [torch.ones(2)], weight)
        assert into.tolist() == [1.5, 1.5]
    with pytest.raises(ValueError, match="weight: expected a finite number"):
        accumulate_([torch.ones(2)], [torch.ones(2)], np.float32("nan"))


@pytest.mark.parametrize("grads", [[None], [torch.ones(2)]])
def test_an_accumulator_that_is_no_tensor(grads: list[Any]) -> None:
    with pytest.raises(TypeError, match=r"into\[0\]: expected a torch.Tensor, got NoneType"):
        accumulate_([None], grads, norm=True)  # type: ignore[list-item]
