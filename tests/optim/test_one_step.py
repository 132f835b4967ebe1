# SPDX-License-Identifier: Apache-2.0
"""A step is one unit: signals come after it, and one with a bad option has left nothing. And what
callers do to groups, state, hooks and gradients."""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hullkit import optim, reference
from hullkit.native.kernels import uninterrupted
from hullkit.optim import _layouts, _tables
from hullkit.optim._tensor_table import TensorTable
from torch import Tensor, nn


class Stop(Exception):
    pass


@contextmanager
def signals_raise() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Stop

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def parameters(*sizes: int) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.ones(size)) for size in sizes]
    for param in params:
        param.grad = torch.ones_like(param)
    return params


def stepping_signals(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of updates so far at each kernel; a signal arrives in each of them."""
    kernel, seen = optimizer._kernel, []

    def interrupted(*arguments: Any) -> None:
        kernel(*arguments)
        seen.append(1)
        signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr(optimizer, "_kernel", interrupted)
    return seen


@pytest.mark.parametrize("kind", [optim.Adam, optim.AdamW, optim.SGD])
def test_a_signal_comes_when_all_groups_are_updated(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    big, small = parameters(9, 3)
    optimizer = kind([{"params": [big]}, {"params": [small], "weight_decay": 0.0}], lr=0.1)
    seen = stepping_signals(optimizer, monkeypatch)
    with signals_raise(), pytest.raises(Stop):
        optimizer.step(num_steps=3)
    assert len(seen) == 2
    assert not torch.equal(big, torch.ones(9))
    assert not torch.equal(small, torch.ones(3))


def test_a_signal_in_the_first_step_with_dampening(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    [param], [other] = parameters(4), parameters(4)
    optimizer, wanted = optim.SGD([param], **options), torch.optim.SGD([other], **options)
    with monkeypatch.context() as patch, signals_raise():
        stepping_signals(optimizer, patch)
        with pytest.raises(Stop):
            optimizer.step()
    optimizer.step()
    wanted.step()
    wanted.step()
    torch.testing.assert_close(param, other)


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("after", ["_launches", "_settle"])
def test_a_signal_before_the_first_update_with_dampening(
    after: str, block: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """State that no update has set is not taken for the sum of gradients."""
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    [param], [other] = parameters(4), parameters(4)
    optimizer, wanted = optim.SGD([param], **options), torch.optim.SGD([other], **options)

    def update() -> None:
        param.grad = None
        with optimizer.update_in_backward() if block else nullcontext():
            param.sum().backward()
        if not block:
            optimizer.step()

    def interrupted(*arguments: Any) -> Any:
        if after == "_launches":
            _tables.TabledOptimizer._launches(optimizer, *arguments)
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(optimizer, after, interrupted)
        with pytest.raises(Stop):
            update()
    for _ in range(2):
        update()
    updates = 3 if block and after == "_settle" else 2  # the block settles at its end
    for _ in range(updates):
        wanted.step()
    torch.testing.assert_close(param, other)


def test_a_first_step_that_fails_leaves_no_buffer() -> None:
    [param], [other] = parameters(4), parameters(4)
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    optimizer, wanted = optim.SGD([param], **options), torch.optim.SGD([other], **options)
    optimizer.param_groups[0]["lr"] = "fast"
    with pytest.raises(ValueError, match="fast"):
        optimizer.step()
    assert not optimizer.state
    optimizer.param_groups[0]["lr"] = 0.1
    again = copy.deepcopy(optimizer)
    [copied] = again.param_groups[0]["params"]
    copied.grad = torch.ones(4)
    again.step()
    wanted.step()
    torch.testing.assert_close(copied, other)


@pytest.mark.parametrize("fails", [True, False])
def test_step_with_that_fails_leaves_no_buffer_of_a_new_parameter(fails: bool) -> None:
    """Of a group that was known, before another group's gradient turns out to be bad."""
    first, new, other = parameters(2, 2, 3)
    optimizer = optim.SGD(
        [{"params": [first, new]}, {"params": [other]}], lr=0.1, momentum=0.9, dampening=0.5
    )
    optimizer.step_with({first: torch.ones(2), other: torch.ones(3)})
    if fails:
        bad = {first: torch.ones(2), new: torch.ones(2), other: torch.ones(4)}
        with pytest.raises(ValueError, match="expected that shape"):
            optimizer.step_with(bad)
        assert new not in optimizer.state
    optimizer.step_with({new: torch.ones(2)})
    torch.testing.assert_close(new.detach(), torch.full((2,), 0.9))  # its first gradient, whole


def test_a_step_that_fails_keeps_the_buffers_of_others() -> None:
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    results = []
    for fails in (True, False):
        first, second = parameters(4, 4)
        second.grad = None
        optimizer = optim.SGD([first, second], **options)
        optimizer.step()
        optimizer.step()
        second.grad = torch.ones(4)
        if fails:
            optimizer.param_groups[0]["lr"] = "fast"
            with pytest.raises(ValueError, match="fast"):
                optimizer.step()
            optimizer.param_groups[0]["lr"] = 0.1
            assert len(optimizer.state) == 1
            optimizer = copy.deepcopy(optimizer)
            first, second = optimizer.param_groups[0]["params"]
            first.grad, second.grad = torch.ones(4), torch.ones(4)
        optimizer.step()
        results.append((first, second))
    for ours, wanted in zip(*results, strict=True):
        assert torch.equal(ours, wanted)


def test_a_table_that_cannot_be_made_leaves_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of no group. On a GPU a capture cannot be the first step."""
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    params, others = parameters(4, 3), parameters(4, 3)
    groups = [{"params": [param]} for param in params]
    optimizer, wanted = optim.SGD(groups, **options), torch.optim.SGD(others, **options)
    made: list[int] = []

    class Failing(TensorTable):
        def __init__(self, *arguments: Any) -> None:
            made.append(1)
            if len(made) == 2:
                raise RuntimeError("expected a first step")
            super().__init__(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(_tables, "TensorTable", Failing)
        with pytest.raises(RuntimeError, match="expected a first step"):
            optimizer.step()
    assert not optimizer.state
    optimizer.step()
    wanted.step()
    for ours, theirs in zip(params, others, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are CUDA's")
def test_a_first_step_in_a_capture_leaves_no_state() -> None:
    param = nn.Parameter(torch.ones(4, device="cuda"))
    param.grad = torch.ones_like(param)
    optimizer = optim.Adam([param], lr=0.1)
    with (
        pytest.raises(RuntimeError, match="expected a first step on these tensors before"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()
    assert not optimizer.state
    optimizer.step()
    torch.testing.assert_close(param.detach().cpu(), torch.full((4,), 0.9))


def test_uninterrupted() -> None:
    done: list[int] = []

    def work(error: Exception | None = None) -> int:
        signal.raise_signal(signal.SIGUSR1)
        done.append(1)
        if error is not None:
            raise error
        return 7

    with signals_raise():
        with pytest.raises(Stop):
            uninterrupted(work)
        with pytest.raises(Stop) as caught:
            uninterrupted(lambda: work(ValueError("mine")))
        assert str(caught.value.__context__) == "mine"
        assert len(done) == 2
        assert uninterrupted(lambda: 5) == 5
        with pytest.raises(ValueError, match="mine"):
            uninterrupted(lambda: int("mine"))
        assert signal.getsignal(signal.SIGUSR1).__name__ == "stop"  # type: ignore[union-attr]


KINDS = [optim.Adam, optim.AdamW, optim.SGD]


@pytest.mark.parametrize("plain", [False, True], ids=["this torch", "older torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_groups_and_state_that_torch_steps_with(
    kind: Any, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if plain:
        monkeypatch.setattr(_layouts, "_exchange", None)
    [param], [other] = parameters(4), parameters(4)
    optimizer, wanted = kind([param], lr=0.1), kind([other], lr=0.1)
    optimizer.step()
    optimizer.param_groups[0]["params"] = tuple(optimizer.param_groups[0]["params"])
    optimizer.state["ema"] = 0.5
    for _ in range(2):
        optimizer.step()
    optimizer.state["ema"] = [1]
    optimizer.step()
    for _ in range(4):
        wanted.step()
    assert torch.equal(param, other)


@pytest.mark.parametrize("default", [False, True])
def test_a_group_has_its_own_decoupled_weight_decay(default: bool) -> None:
    """The argument is for groups without."""
    params = parameters(4, 4, 4, 4)
    own = [{"params": params[i], "decoupled_weight_decay": bool(i)} for i in range(2)]
    optimizer = optim.Adam(
        [*own, {"params": params[2]}], lr=0.1, weight_decay=0.5, decoupled_weight_decay=default
    )
    optimizer.add_param_group({"params": params[3]})
    optimizer.step()
    for param, decoupled in zip(params, (False, True, default, default), strict=True):
        [other] = parameters(4)
        kind = torch.optim.AdamW if decoupled else torch.optim.Adam
        kind([other], lr=0.1, weight_decay=0.5).step()
        torch.testing.assert_close(param, other)


@pytest.mark.parametrize("kind", [optim.Adam, optim.AdamW])
def test_amsgrad_that_is_set_later_is_refused(kind: Any) -> None:
    [param] = parameters(4)
    optimizer = kind([param])
    optimizer.step()
    before = param.detach().clone()
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="amsgrad: expected False, got True"):
        optimizer.step()
    assert torch.equal(param, before)


@pytest.mark.parametrize("rounded", [False, True])
def test_a_hook_unwraps_what_is_loaded(rounded: bool) -> None:
    def made() -> optim.Adam:
        param = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        param.grad = torch.ones_like(param)
        return optim.Adam([param], lr=0.5, stochastic_rounding=rounded)

    source, target = made(), made()
    source.step()
    target.register_load_state_dict_pre_hook(lambda _, given: given["opt"])
    target.load_state_dict({"opt": source.state_dict()})
    [ours], [theirs] = target.state.values(), source.state.values()
    for name in ("exp_avg", "exp_avg_sq", "step"):
        assert ours[name].dtype is theirs[name].dtype
        assert torch.equal(ours[name], theirs[name])
    assert len(target._optimizer_load_state_dict_pre_hooks) == 1
    state, again = source.state_dict(), []

    def reload(optimizer: Any) -> None:
        if not again:
            again.append(1)
            optimizer.load_state_dict({"opt": state})

    target.register_load_state_dict_post_hook(reload)
    target.load_state_dict({"opt": state})
    assert again == [1]


def test_what_a_hook_makes_of_loaded_moments_stays() -> None:
    param = nn.Parameter(torch.ones(4, dtype=torch.float16))
    param.grad = torch.ones_like(param)
    optimizer = optim.Adam([param], lr=0.5, stochastic_rounding=True)
    optimizer.step()
    state = optimizer.state_dict()

    def clear(loaded: Any) -> None:
        loaded.state[param]["exp_avg"].zero_()

    optimizer.register_load_state_dict_post_hook(clear)
    optimizer.load_state_dict(state)
    assert optimizer.state[param]["exp_avg"].dtype is torch.bfloat16
    assert not optimizer.state[param]["exp_avg"].any()
    assert optimizer.state[param]["exp_avg_sq"].all()
    assert len(optimizer._optimizer_load_state_dict_post_hooks) == 1


def test_a_gradient_that_somebody_took_is_named() -> None:
    param = nn.Parameter(torch.ones(2, 3))

    def take(param: Tensor) -> None:
        param.grad = None

    param.register_post_accumulate_grad_hook(take)
    optimizer = optim.SGD([param], lr=0.1)
    with (
        pytest.raises(RuntimeError, match=r"parameter of shape \(2, 3\) .* got None: another hook"),
        optimizer.update_in_backward(),
    ):
        param.sum().backward()


def test_gradients_of_others_are_refused() -> None:
    [param] = parameters(4)
    optimizer = optim.SGD([param], lr=0.1)
    for strange, got in ((nn.Parameter(torch.ones(2)), r"one of shape \(2,\)"), ("x", "'x'")):
        with pytest.raises(
            ValueError, match=f"grads: expected .*optimizer's parameters, got {got}"
        ):
            optimizer.step_with({param: torch.ones(4), strange: torch.ones(2)})  # type: ignore[dict-item]
    assert torch.equal(param, torch.ones(4))


def test_a_weight_beyond_floats() -> None:
    with pytest.raises(ValueError, match="weight: expected a finite number"):
        optim.accumulate_([torch.zeros(2)], [torch.ones(2)], 10**400)


def test_the_oracle_leaves_its_arguments_alone() -> None:
    param, grad, zeros, step = np.ones(2), np.ones(2), np.zeros(2), np.array(1.0)
    *_, after = reference.adam(param, grad, zeros, zeros, step, lr=0.1, num_steps=3)  # type: ignore[arg-type]
    assert after == 4.0
    assert step == 1.0
    assert param.tolist() == grad.tolist() == [1.0] * 2
    assert not zeros.any()
