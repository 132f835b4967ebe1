# SPDX-License-Identifier: Apache-2.0
"""Updates that run as each gradient becomes ready: the same bits, no gradient left."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _optim import KINDS, WAYS, Way, equal_bits
from hullkit import optim
from hullkit.optim import _layouts
from torch import Tensor, distributed, nn
from torch.utils.checkpoint import checkpoint


class Tied(nn.Module):
    """A weight used twice, one frozen, one never used."""

    def __init__(self, device: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator).to(device))

        self.embedding = normal(11, 6)
        self.hidden = normal(6, 6)
        self.bias = normal(6)
        self.frozen = normal(6).requires_grad_(False)
        self.unused = normal(2)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.embedding[ids] @ self.hidden + self.bias * self.frozen)
        return (x @ self.embedding.t()).logsumexp(-1).mean()


def test_an_interrupt_on_entry_leaves_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    register = Tensor.register_post_accumulate_grad_hook

    def interrupted(param: Tensor, hook: Any) -> Any:
        if param is params[1]:
            raise KeyboardInterrupt
        return register(param, hook)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "register_post_accumulate_grad_hook", interrupted)
        with pytest.raises(KeyboardInterrupt), optim.SGD(params, lr=0.1).update_in_backward():
            pass
    (params[0].sum() + params[1].sum()).backward()
    assert all(bool((p == 1.0).all()) and p.grad is not None for p in params)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_as_step(kind: str, way: Way) -> None:
    cls, _, options = KINDS[kind]
    models = [Tied(way.device) for _ in range(2)]
    first, second = (cls(m.parameters(), backend=way.backend, **options) for m in models)
    for call in range(4):
        ids = torch.randint(0, 11, (20,), generator=torch.Generator().manual_seed(call))
        ids = ids.to(way.device)
        with first.update_in_backward(num_steps=call + 1):
            models[0](ids).backward()
        assert all(p.grad is None for p in models[0].parameters())
        models[1](ids).backward()
        second.step(num_steps=call + 1)
        second.zero_grad()
    assert equal_bits(*(list(m.parameters()) for m in models))
    assert len(first.state) == len(second.state)
    for param, other in zip(*(m.parameters() for m in models), strict=True):
        mine, wanted = first.state.get(param, {}), second.state.get(other, {})
        assert mine.keys() == wanted.keys()
        assert all(torch.equal(mine[name], wanted[name]) for name in wanted)
    # and the two forms can take turns
    models[0](ids).backward()
    first.step()
    first.zero_grad()
    with second.update_in_backward():
        models[1](ids).backward()
    assert equal_bits(*(list(m.parameters()) for m in models))


def test_gradients_never_exist_together() -> None:
    """At most two gradients of ten layers are alive at any time."""
    layers = [nn.Parameter(torch.randn(50, 50)) for _ in range(10)]
    optimizer = optim.SGD(layers, lr=1e-3)
    most = 0

    def count(_: Tensor) -> None:
        nonlocal most
        most = max(most, sum(layer.grad is not None for layer in layers))

    hooks = [layer.register_post_accumulate_grad_hook(count) for layer in layers]
    x = torch.randn(3, 50)
    for layer in layers:
        x = torch.tanh(x @ layer)
    with optimizer.update_in_backward():
        x.sum().backward()
    assert most == 1
    assert all(hook is not None for hook in hooks)


def test_refusals() -> None:
    model = Tied("cpu")
    ids = torch.arange(5)
    clipping = optim.Adam(model.parameters(), max_grad_norm=1.0)
    with (
        pytest.raises(ValueError, match="max_grad_norm: expected None for an update in backward"),
        clipping.update_in_backward(),
    ):
        pass
    optimizer = optim.Adam(model.parameters())
    model(ids).backward()
    with (
        pytest.raises(ValueError, match=r"expected no gradients .* got 3; call zero_grad"),
        optimizer.update_in_backward(),
    ):
        pass
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="num_steps: expected an int in 1"):  # noqa: SIM117
        with optimizer.update_in_backward(num_steps=0):
            pass


def test_second_gradient_is_an_error() -> None:
    model = Tied("cpu")
    optimizer = optim.Adam(model.parameters())
    ids = torch.arange(5)
    with optimizer.update_in_backward():
        model(ids).backward()
        with pytest.raises(RuntimeError, match=r"expected one gradient .* got a second"):
            model(ids).backward()
    before = [p.detach().clone() for p in model.parameters()]
    model(ids).backward()  # the hooks are gone
    assert equal_bits(before, list(model.parameters()))


@pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="torch without torch.distributed's gloo",
)
@pytest.mark.parametrize("as_views", [False, True])
def test_sums_over_ranks_come_too_late(as_views: bool) -> None:
    """DistributedDataParallel would leave each rank with its own gradient's update, and say
    nothing."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(
            nn.Linear(3, 2), gradient_as_bucket_view=as_views
        )
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        with (
            pytest.raises(RuntimeError, match=r"got 2: .* DistributedDataParallel .* step\(\)"),
            optimizer.update_in_backward(),
        ):
            model(torch.ones(1, 3)).sum().backward()
        optimizer.zero_grad()
        with model.no_sync(), optimizer.update_in_backward():  # sums nothing
            model(torch.ones(1, 3)).sum().backward()
        assert all(param.grad is None for param in model.parameters())
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    finally:
        distributed.destroy_process_group()


def test_own_step_inside() -> None:
    """With gradients that are gone at the block's end."""
    param = nn.Parameter(torch.zeros(2))
    optimizer = optim.SGD([param], lr=1.0)
    with optimizer.update_in_backward():
        param.sum().backward()
        param.grad = torch.ones(2)
        optimizer.step()
        optimizer.zero_grad()
    assert param.tolist() == [-2.0] * 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    """Without reentrance: the same bits. With it a shared weight gets two gradients: refused."""
    results: list[list[Tensor]] = []
    for in_backward in (False, True):
        torch.manual_seed(0)
        shared, own = nn.Linear(4, 4), nn.Linear(4, 4)
        params = [*shared.parameters(), *own.parameters()]
        optimizer = optim.Adam(params)
        x = torch.randn(3, 4, requires_grad=True)

        def run(x: Tensor, shared: nn.Module = shared, own: nn.Module = own) -> Any:
            h = checkpoint(shared, x, use_reentrant=reentrant)
            return checkpoint(lambda y: own(shared(y)), h, use_reentrant=reentrant).sum()

        if not in_backward:
            run(x).backward()
            optimizer.step(num_steps=2)
        elif reentrant:
            with pytest.raises(RuntimeError, match="got a second"):  # noqa: SIM117
                with optimizer.update_in_backward(num_steps=2):
                    run(x).backward()
            return
        else:
            with optimizer.update_in_backward(num_steps=2):
                run(x).backward()
        results.append(params)
    assert equal_bits(*results)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", ["cleared", "replaced", "one"])
def test_state_that_the_block_changes(change: str, kind: str, way: Way) -> None:
    """As between two steps."""

    def other_state(optimizer: Any) -> None:
        if change == "cleared":
            optimizer.state.clear()
        params = [p for p in optimizer.param_groups[0]["params"] if p in optimizer.state]
        for param in params[: 1 if change == "one" else None]:
            own = optimizer.state[param]
            optimizer.state[param] = {
                name: value * 2 if isinstance(value, Tensor) and value.ndim else value
                for name, value in own.items()
            }

    cls, _, options = KINDS[kind]
    models = [Tied(way.device) for _ in range(2)]
    first, second = (cls(m.parameters(), backend=way.backend, **options) for m in models)
    for call in range(3):
        ids = torch.arange(9, device=way.device)
        with first.update_in_backward():
            if call == 1:
                other_state(first)
            models[0](ids).backward()
        if call == 1:
            other_state(second)
        models[1](ids).backward()
        second.step()
        second.zero_grad()
        assert equal_bits([*models[0].parameters()], [*models[1].parameters()])


def calls_of(function: Callable[[], Any]) -> int:
    """How many functions Python calls meanwhile: its time, but the same in every run."""
    count = 0

    def note(_frame: Any, event: str, _arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize("how", ["block", "cleared inside", "step"])
def test_first_updates_take_time_linear_in_parameters(how: str) -> None:
    """Each parameter's, and each group's."""
    calls = []
    for count in (20, 80):
        params = [nn.Parameter(torch.ones(2)) for _ in range(count)]
        optimizer = optim.Adam([{"params": [param]} for param in params])

        def update(params: Any = params, optimizer: Any = optimizer) -> None:
            loss = sum(param.sum() for param in params)
            if how == "step":
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                return
            with optimizer.update_in_backward():
                if how == "cleared inside":
                    optimizer.state.clear()
                loss.backward()

        update()
        optimizer.reset()
        calls.append(calls_of(update))
    assert calls[1] < 5 * calls[0]


@pytest.mark.parametrize("exchange", [True, False], ids=["dlpack", "plain"])
def test_state_replaced_after_its_update(exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other parameters' tables that are made later in the block hide it from nobody."""
    if not exchange:
        monkeypatch.setattr(_layouts, "_exchange", None)
    results = []
    for cls in (optim.Adam, torch.optim.Adam):
        first, second = (nn.Parameter(torch.ones(3)) for _ in range(2))
        optimizer = cls([first, second], lr=0.1)
        first.sum().backward()
        optimizer.step()
        optimizer.zero_grad()

        def replace(_: Tensor, optimizer: Any = optimizer, first: Any = first) -> None:
            for name, value in optimizer.state[first].items():
                optimizer.state[first][name] = value * 3 if value.ndim else value.clone()

        if cls is optim.Adam:
            with optimizer.update_in_backward():
                first.sum().backward()
                hook = second.register_hook(replace)
                (2 * second).sum().backward()
                hook.remove()
        else:
            (first.sum() + (2 * second).sum()).backward()
            optimizer.step()
            replace(first)
        optimizer.zero_grad()
        (3 * first).sum().backward()
        optimizer.step()
        results.append([first, *(optimizer.state[first][name] for name in ("step", "exp_avg"))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("exchange", [True, False], ids=["dlpack", "plain"])
def test_state_laid_out_anew_between_step_and_block(
    exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block lays state out as the parameter is. The step, whose tables are for the parameter
    as it is again later, does not write to where the state was."""
    if not exchange:
        monkeypatch.setattr(_layouts, "_exchange", None)
    results = []
    for cls in (optim.Adam, torch.optim.Adam):
        param = nn.Parameter(torch.arange(9.0).view(3, 3))
        optimizer = cls([param], lr=0.1)
        weights = torch.arange(1.0, 10.0).view(3, 3)
        for scale, turned, block in [(1.0, False, False), (-2.0, True, True), (0.5, True, False)]:
            if turned:
                param.data = param.data.t()
            loss = (param * weights * scale).sum()
            _update(optimizer, loss, block and cls is optim.Adam)
        results.append([param, *optimizer.state[param].values()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def _update(optimizer: Any, loss: Tensor, block: bool) -> None:
    if block:
        with optimizer.update_in_backward():
            loss.backward()
    else:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_parameter_taken_out_of_the_groups_inside() -> None:
    """It was there as the block began."""
    first, second = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = optim.SGD([first, second], lr=0.5)
    with optimizer.update_in_backward():
        optimizer.param_groups[0]["params"] = [first]
        (first + second).sum().backward()
    assert first.tolist() == second.tolist() == [0.5] * 3


@pytest.mark.parametrize("how", ["block", "replaced", "group", "emptied", "block and step"])
def test_parameters_that_left_are_not_kept_alive(how: str) -> None:
    stays, leaves = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4))
    optimizer = optim.SGD([{"params": [stays]}, {"params": [leaves]}], lr=0.1)
    gone = weakref.ref(leaves)

    def update(block: bool) -> None:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        loss = sum((param.sum() for param in params), torch.zeros(()))
        _update(optimizer, loss, block)

    update(block=how.startswith("block"))
    if how == "replaced":
        optimizer.param_groups[1]["params"] = [nn.Parameter(torch.ones(2))]
    elif how == "emptied":
        optimizer.param_groups[1]["params"] = []
    else:
        del optimizer.param_groups[1]
    del leaves
    update(block=how == "block")
    gc.collect()
    assert gone() is None
    assert stays.tolist() == pytest.approx([0.8] * 3)
