# SPDX-License-Identifier: Apache-2.0
"""Who calls a step or looks on: hooks, schedulers, torch.compile, classes of tensors."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from _distributed import in_a_process_group
from _optim import WAYS, Way, equal_bits, parameters
from hullkit import optim
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_pre_hook

OPTIMIZERS = ["Adam", "AdamW", "SGD"]
STEPS = ["step", "step_with", "update_in_backward"]


def one_step(how: str, optimizer: Any, model: nn.Module, num_steps: int = 1) -> None:
    loss = model(torch.ones(2, 3)).square().sum()
    if how == "update_in_backward":
        with optimizer.update_in_backward(num_steps=num_steps):
            loss.backward()
    elif how == "step_with":
        params = list(model.parameters())
        grads = torch.autograd.grad(loss, params)
        optimizer.step_with(dict(zip(params, grads, strict=True)), num_steps=num_steps)
    else:
        loss.backward()
        optimizer.step(num_steps=num_steps)
        optimizer.zero_grad()


@pytest.mark.parametrize("how", STEPS)
def test_hooks_and_schedulers_see_every_step(how: str) -> None:
    model = nn.Linear(3, 3)
    optimizer = optim.AdamW(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    calls: list[Any] = []
    before = model.weight.detach().clone()

    def pre(own: Any, args: Any, kwargs: Any) -> None:
        calls.append(("pre", own is optimizer, kwargs["num_steps"]))
        assert torch.equal(model.weight, before)

    def post(own: Any, args: Any, kwargs: Any) -> None:
        calls.append(("post", own is optimizer, kwargs["num_steps"]))
        assert not torch.equal(model.weight, before)

    optimizer.register_step_pre_hook(pre)
    optimizer.register_step_post_hook(post)
    one_step(how, optimizer, model, 2)
    schedule.step()  # a warning is an error here
    assert calls == [("pre", True, 2), ("post", True, 2)]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


@pytest.mark.parametrize("how", STEPS)
def test_scheduler_without_hooks(how: str) -> None:
    model = nn.Linear(3, 3)
    optimizer = optim.SGD(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    one_step(how, optimizer, model)
    schedule.step()


@pytest.mark.parametrize("how", STEPS)
def test_hooks_of_all_optimizers_may_change_arguments(how: str) -> None:
    """A pre-step hook that returns arguments replaces those given."""

    def twice(own: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "num_steps": 2}

    handle = register_optimizer_step_pre_hook(twice)
    models = [nn.Linear(3, 3)]
    models.append(copy.deepcopy(models[0]))
    try:
        one_step(how, optim.Adam(models[0].parameters()), models[0])
    finally:
        handle.remove()
    one_step(how, optim.Adam(models[1].parameters()), models[1], 2)
    assert equal_bits(*(list(m.parameters()) for m in models))


def test_no_post_hook_after_an_error_in_backward() -> None:
    model = nn.Linear(3, 3)
    optimizer = optim.Adam(model.parameters())
    calls: list[str] = []
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    with pytest.raises(KeyError), optimizer.update_in_backward():
        raise KeyError
    assert not calls


@pytest.mark.plain_memory
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("how", STEPS)
def test_compiled_callers(how: str, name: str) -> None:
    """The step runs outside the graph, and gives the weights it gives without a compiler."""
    weights = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(3, 3)
        optimizer = getattr(optim, name)(model.parameters(), lr=0.1)

        def call(optimizer: Any = optimizer, model: nn.Module = model) -> None:
            one_step(how, optimizer, model)

        run = torch.compile(call, backend="aot_eager") if compiled else call
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of what it cannot trace
            for _ in range(4):
                run()
        weights.append(list(model.parameters()))
    torch._dynamo.reset()
    for first, second in zip(*weights, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)


@pytest.mark.plain_memory
def test_compiled_accumulation() -> None:
    into, grad = torch.zeros(3), torch.ones(3)

    @torch.compile(backend="aot_eager")
    def call() -> Tensor:
        optim.accumulate_([into], [grad * 2.0], 0.5)
        return into + 1.0

    for _ in range(3):
        last = call()
    torch._dynamo.reset()
    assert into.tolist() == [3.0] * 3
    assert last.tolist() == [4.0] * 3


class Logged(torch.Tensor):
    """Says itself what operations do."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Named(nn.Parameter):
    """A parameter with a name, as quantisation libraries make them."""


def without_memory() -> list[Tensor]:
    with FakeTensorMode():
        fake = torch.ones(3)
    freed = torch.ones(3)
    freed.untyped_storage().resize_(0)
    return [
        torch.Tensor._make_subclass(Logged, torch.ones(3)),
        fake,
        torch._to_functional_tensor(torch.ones(3)),
        freed,
    ]


@pytest.mark.plain_memory
@pytest.mark.parametrize("place", range(4))
def test_tensors_without_memory_of_their_own(place: int) -> None:
    """Refused by name wherever they come in: as parameters, gradients, state, accumulators."""
    tensor = without_memory()[place]
    name = type(tensor).__name__
    expected = f"expected a tensor with memory of its own, got a {name}"
    with pytest.raises(TypeError, match=f"params: {expected}"):
        optim.SGD([tensor.requires_grad_()])
    tensor = without_memory()[place]
    param = nn.Parameter(torch.ones(3))
    optimizer = optim.SGD([param], momentum=0.9)
    for given in (False, True):
        if given:  # the tables are there already
            optimizer.step_with({param: torch.zeros(3)})
        with pytest.raises(TypeError, match=f"grad of a parameter of shape .*: {expected}"):
            optimizer.step_with({param: tensor})
    for into, grads in (([tensor], [torch.ones(3)]), ([torch.zeros(3)], [tensor])):
        with pytest.raises(TypeError, match=rf"(into|grads)\[0\]: {expected}"):
            optim.accumulate_(into, grads)
    assert param.tolist() == [1.0] * 3


def test_subclasses_that_are_plain_memory() -> None:
    param = Named(torch.ones(3))
    optimizer = optim.SGD([param], lr=1.0)
    for _ in range(2):
        param.grad = torch.ones(3)
        optimizer.step()
    assert param.tolist() == [-1.0] * 3


def test_dtensor(tmp_path: Path) -> None:
    """Refused by name: its memory is a shard, and its state would have to be one too."""

    def check() -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, distribute_tensor

        mesh = init_device_mesh("cpu", (1,))
        sharded = distribute_tensor(torch.ones(3), mesh, [Replicate()])
        for count in (1, 2):
            params = [nn.Parameter(sharded.clone()) for _ in range(count)]
            with pytest.raises(TypeError, match=r"params: .* got a DTensor; .*\.to_local\(\)"):
                optim.AdamW(params)
        plain = nn.Parameter(torch.ones(3))
        with pytest.raises(TypeError, match=r"grad of .* got a DTensor; .*\.to_local\(\)"):
            optim.AdamW([plain]).step_with({plain: sharded})

    in_a_process_group(tmp_path, check)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_twice(name: str) -> None:
    """torch warns and means to refuse it; its own forms differ in what they make of it."""
    param, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    cls = getattr(optim, name)
    with (
        pytest.warns(UserWarning, match="duplicate parameters"),
        pytest.raises(ValueError, match="params: expected every parameter once, got one twice"),
    ):
        cls([param, other, param])
    optimizer = cls([param])
    with (
        pytest.warns(UserWarning, match="duplicate parameters"),
        pytest.raises(ValueError, match="params: expected every parameter once, got one twice"),
    ):
        optimizer.add_param_group({"params": [other, other]})
    assert len(optimizer.param_groups) == 1  # nothing half done
    optimizer.param_groups[0]["params"] = [param, param]
    param.grad = torch.ones(3)
    with pytest.raises(ValueError, match="params: expected every parameter once, got one twice"):
        optimizer.step()


@pytest.mark.parametrize("way", WAYS)
def test_a_fresh_buffer_takes_one_gradient_undamped(way: Way) -> None:
    """Of several updates in the first call it is the first alone."""
    [ours], [theirs] = (parameters([torch.ones(700, device=way.device)]) for _ in range(2))
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    first = optim.SGD([ours], **options, backend=way.backend)
    second = torch.optim.SGD([theirs], **options)
    ours.grad = theirs.grad = torch.ones_like(ours)
    first.step(num_steps=3)
    for _ in range(3):
        second.step()
    torch.testing.assert_close(ours, theirs)
