# SPDX-License-Identifier: Apache-2.0
"""What the optimizers and accumulate_ refuse, and what their messages say."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hullkit import optim
from torch import nn


def param(**options: Any) -> nn.Parameter:
    return nn.Parameter(torch.zeros(4, 6, **options))


@pytest.mark.parametrize("cls", [optim.Adam, optim.AdamW, optim.SGD])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"foreach": True}, ValueError, "foreach: expected None or False, got True"),
        ({"fused": False}, ValueError, "fused: expected None or True, got False"),
        ({"differentiable": True}, ValueError, "differentiable: expected False"),
        ({"max_grad_norm": -1.0}, ValueError, r"max_grad_norm: expected a number >= 0.0, got -1.0"),
        ({"max_grad_norm": "1"}, TypeError, "max_grad_norm: expected a number, got str"),
        ({"backend": "cuda"}, ValueError, "backend: expected None or 'triton', got 'cuda'"),
        ({"lr": -1.0}, ValueError, "Invalid learning rate"),
        ({"momentun": 0.9}, TypeError, "momentun"),
    ],
)
def test_bad_options(
    cls: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cls([param()], **options)


def test_a_number_in_the_place_of_the_closure() -> None:
    with pytest.raises(TypeError, match="closure: expected a callable or None, got int; num_steps"):
        optim.Adam([param()]).step(2)  # type: ignore[arg-type]


@pytest.mark.parametrize("cls", [optim.Adam, optim.AdamW])
def test_amsgrad(cls: Any) -> None:
    with pytest.raises(ValueError, match="amsgrad: expected False, got True"):
        cls([param()], amsgrad=True)
    weights = [param()]
    saved = torch.optim.Adam(weights, amsgrad=True).state_dict()
    ours = cls(weights)
    with pytest.raises(ValueError, match="amsgrad: expected False, got True"):
        ours.load_state_dict(saved)


@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        (torch.zeros(3, dtype=torch.complex64), TypeError, "expected dtype float64.*complex64"),
        (torch.zeros(3).to(torch.float8_e4m3fn), TypeError, "expected dtype float64.*float8"),
        (torch.zeros(6)[::2], ValueError, r"expected elements side by side.*strides \(2,\)"),
        (torch.zeros(1).expand(5), ValueError, r"expected elements side by side.*strides \(0,\)"),
        (torch.zeros(3, 3).to_sparse(), ValueError, "expected elements side by side.*sparse_coo"),
        (torch.zeros(3, device="meta"), NotImplementedError, "expected CPU or CUDA.*meta"),
    ],
)
def test_bad_parameters(tensor: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"params.*{message}"):
        optim.Adam([nn.Parameter(tensor)])
    optimizer = optim.SGD([param()])
    with pytest.raises(error, match=f"params.*{message}"):
        optimizer.add_param_group({"params": [nn.Parameter(tensor)]})


def test_parameters_that_share_memory() -> None:
    whole = torch.zeros(10)
    with pytest.raises(ValueError, match="params: expected tensors that share no memory"):
        optim.Adam([nn.Parameter(whole[:6]), nn.Parameter(whole[5:])])


@pytest.mark.parametrize("num_steps", [0, -1, 1.5, True])
def test_bad_num_steps(num_steps: Any) -> None:
    weight = param()
    weight.grad = torch.ones(4, 6)
    optimizer = optim.Adam([weight])
    with pytest.raises((TypeError, ValueError), match="num_steps: expected an int"):
        optimizer.step(num_steps=num_steps)
    with pytest.raises((TypeError, ValueError), match="num_steps: expected an int"):
        optimizer.step_with({weight: weight.grad}, num_steps=num_steps)
    assert torch.equal(weight, torch.zeros(4, 6))


def test_sparse_gradient() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    before = embedding.weight.detach().clone()
    optimizer = optim.Adam(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"grad of a parameter of shape \(5, 3\).*sparse=False"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)
    assert not optimizer.state.get(embedding.weight)


@pytest.mark.parametrize(
    ("grad", "error", "message"),
    [
        (torch.ones(4, 5), ValueError, r"expected that shape on cpu, got \(4, 5\) on cpu"),
        (torch.ones(4, 6, dtype=torch.int64), TypeError, "expected dtype float64.*int64"),
        (torch.ones(4, 6, dtype=torch.complex64), TypeError, "expected dtype float64.*complex64"),
    ],
)
def test_bad_explicit_gradients(grad: Any, error: type[Exception], message: str) -> None:
    weight = param()
    with pytest.raises(error, match=message):
        optim.Adam([weight]).step_with({weight: grad})


@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize(
    ("cls", "name", "value", "message"),
    [
        (optim.Adam, "lr", float("nan"), "lr: expected a number, got nan"),
        (optim.AdamW, "lr", torch.tensor(float("nan")), r"lr: expected a number, got tensor\(nan"),
        (optim.SGD, "weight_decay", float("nan"), "weight_decay: expected a number, got nan"),
        (optim.Adam, "betas", (1.0, 0.999), r"betas: expected numbers in \[0, 1\), got \(1.0, 0.9"),
        (optim.Adam, "betas", (0.9, -0.5), r"betas: expected numbers in \[0, 1\)"),
        (optim.Adam, "betas", (0.9, float("nan")), r"betas: expected numbers in \[0, 1\)"),
        (optim.AdamW, "amsgrad", True, "amsgrad: expected False, got True"),
    ],
)
def test_options_that_turn_bad_later(
    cls: Any, name: str, value: Any, message: str, block: bool, steps_before: int
) -> None:
    """Of two groups, the second one's: a step that fails makes no state for the first one either.
    SGD would damp the first gradient into a buffer of zeros."""
    options = {"momentum": 0.9} if cls is optim.SGD else {}
    weights = [param(), param()]
    optimizer = cls([{"params": [weight]} for weight in weights[block:]], lr=0.1, **options)
    for bad in [*[False] * steps_before, True]:
        before = [weight.detach().clone() for weight in weights]
        if bad:
            optimizer.param_groups[-1][name] = value
        with pytest.raises(ValueError, match=message) if bad else nullcontext():
            if block:
                with optimizer.update_in_backward():
                    weights[1].sum().backward()
            else:
                (weights[0] + weights[1]).sum().backward()
                optimizer.step()
        optimizer.zero_grad()
        same = [torch.equal(weight, b) for weight, b in zip(weights, before, strict=True)]
        assert same == [bad or block, bad]
    assert bool(optimizer.state) == bool(steps_before)


@pytest.mark.parametrize(("grads", "got"), [([torch.ones(4, 6)], "list"), (None, "NoneType")])
def test_explicit_gradients_are_a_mapping(grads: Any, got: str) -> None:
    message = f"grads: expected a mapping from parameters to gradients, got {got}"
    with pytest.raises(TypeError, match=message):
        optim.Adam([param()]).step_with(grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stochastic_rounding_is_for_halves(dtype: torch.dtype) -> None:
    """Beside halves other parameters are updated as ever."""
    with pytest.raises(TypeError, match=r"stochastic_rounding: expected False.*got True"):
        optim.Adam([param(dtype=dtype)], stochastic_rounding=True)
    optim.Adam([param(dtype=torch.bfloat16), param(dtype=dtype)], stochastic_rounding=True)


def test_float16_with_the_semantics_of_torch_warns() -> None:
    with pytest.warns(UserWarning, match="stochastic_rounding=True"):
        optim.Adam([param(dtype=torch.float16)])
    optim.Adam([param(dtype=torch.float16)], stochastic_rounding=True)  # warnings are errors here


@pytest.mark.parametrize("cls", [optim.Adam, optim.AdamW])
def test_the_warning_names_the_line_that_brought_float16(cls: Any) -> None:
    optimizer = cls([param()])
    optimizer.add_param_group({"params": param()})
    rounding = cls([param(dtype=torch.float16)], stochastic_rounding=True)
    rounding.add_param_group({"params": param(dtype=torch.float16)})

    def construct() -> Any:
        return cls([param(dtype=torch.float16)])

    def add() -> None:
        optimizer.add_param_group({"params": param(dtype=torch.float16)})

    for bring in (construct, add):
        with pytest.warns(UserWarning, match="stochastic_rounding=True") as warned:
            bring()
        assert [(w.filename, w.lineno) for w in warned] == [
            (__file__, bring.__code__.co_firstlineno + 1)
        ]
    optimizer.add_param_group({"params": param()})  # the others were told of


def test_loaded_state_of_another_shape() -> None:
    weight = param()
    optimizer = optim.Adam([weight])
    optimizer.state[weight] = {
        "step": torch.tensor(1.0),
        "exp_avg": torch.zeros(3),
        "exp_avg_sq": torch.zeros(3),
    }
    weight.grad = torch.ones(4, 6)
    with pytest.raises(
        ValueError, match=r"state\['exp_avg'\]: expected shape \(4, 6\), got \(3,\)"
    ):
        optimizer.step()


@pytest.mark.parametrize("shape", [(0,), (3,), (1, 0)])
def test_a_step_counter_of_more_or_less_than_one_element(shape: tuple[int, ...]) -> None:
    """An empty one has no address to count at."""
    weight = param()
    weight.grad = torch.ones(4, 6)
    optimizer = optim.Adam([weight])
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = torch.zeros(shape)
    optimizer.load_state_dict(saved)
    before = weight.detach().clone()
    got = re.escape(str(shape))
    with pytest.raises(ValueError, match=rf"state\['step'\]: expected one element, got .*{got}"):
        optimizer.step()
    assert torch.equal(weight, before)
    saved["state"][0]["step"] = torch.zeros(1)  # as older checkpoints have it
    optimizer.load_state_dict(saved)
    optimizer.step()


@pytest.mark.parametrize(
    ("cls", "name", "options"),
    [
        (optim.Adam, "exp_avg", {}),
        (optim.Adam, "exp_avg_sq", {"stochastic_rounding": True}),
        (optim.SGD, "momentum_buffer", {"momentum": 0.9}),
    ],
)
def test_loaded_state_that_is_no_tensor(cls: Any, name: str, options: dict[str, Any]) -> None:
    weight = param(dtype=torch.bfloat16)
    weight.grad = torch.ones_like(weight)
    optimizer = cls([weight], **options)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0][name] = [1.0, 2.0]

    def load_and_step() -> None:
        optimizer.load_state_dict(saved)
        optimizer.step()

    message = rf"state\['{name}'\]: expected a torch.Tensor, got list"
    with pytest.raises(TypeError, match=message):
        load_and_step()


class TestAccumulate:
    @pytest.mark.parametrize(
        ("into", "grads", "error", "message"),
        [
            ([torch.zeros(3)], [], ValueError, "grads: expected 1, as many as into, got 0"),
            ([torch.zeros(3)], [torch.ones(4)], ValueError, r"grads\[0\]: expected shape \(3,\)"),
            (
                [torch.zeros(3).double()],
                [torch.ones(3)],
                TypeError,
                r"into\[0\]: expected a dense float32 tensor, got torch.float64",
            ),
            (
                [torch.zeros(6)[::2]],
                [torch.ones(3)],
                TypeError,
                r"into\[0\]: expected a dense float32 tensor, got .* strides \(2,\)",
            ),
            (
                [torch.zeros(3)] * 1 + [torch.zeros(3)],
                [torch.ones(3), torch.ones(3).half()],
                TypeError,
                r"grads\[1\]: expected one dtype for all.*float16",
            ),
            ([torch.zeros(3)], [torch.ones(3).long()], TypeError, r"grads\[0\].*int64"),
            (
                [torch.zeros(3)],
                [[1.0]],
                TypeError,
                r"grads\[0\]: expected a torch.Tensor, got list",
            ),
            (
                [torch.zeros(3, 3)],
                [torch.ones(3, 3).to_sparse()],
                TypeError,
                r"grads\[0\]: expected a dense tensor",
            ),
            (
                [torch.zeros(3)],
                [torch.ones(3, device="meta")],
                ValueError,
                r"grads\[0\]: expected shape \(3,\) on cpu, got \(3,\) on meta",
            ),
        ],
    )
    def test_bad_lists(self, into: Any, grads: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            optim.accumulate_(into, grads)
        assert all(not tensor.any() for tensor in into)

    @pytest.mark.parametrize("weight", [float("nan"), float("inf"), 1e39, -1e39, 10**400])
    def test_bad_weight(self, weight: Any) -> None:
        with pytest.raises(ValueError, match="weight: expected a finite number"):
            optim.accumulate_([torch.zeros(3)], [torch.ones(3)], weight)

    @pytest.mark.parametrize("weight", ["1", None, True, 1j, torch.tensor(0.5)])
    def test_a_weight_that_is_no_number(self, weight: Any) -> None:
        with pytest.raises(TypeError, match="weight: expected a number, got"):
            optim.accumulate_([torch.zeros(3)], [torch.ones(3)], weight)

    def test_accumulators_that_share_memory(self) -> None:
        whole = torch.zeros(10)
        with pytest.raises(ValueError, match="into: expected tensors that share no memory"):
            optim.accumulate_([whole[:6], whole[5:]], [torch.ones(6), torch.ones(5)])

    def test_gradients_that_share_memory_with_accumulators(self) -> None:
        whole = torch.arange(20.0)
        wanted = whole.clone()
        first, second = whole[:10], whole[10:]
        for into, grads in (
            ([whole[1:]], [whole[:-1]]),
            ([first, second], [second, first]),
            ([first, second], [torch.ones(10), whole[5:15]]),
            ([first], [whole.view(torch.float64)]),
            ([first], [whole.view(torch.float16)[:10]]),
        ):
            with pytest.raises(ValueError, match="grads: expected tensors that share no memory"):
                optim.accumulate_(into, grads)
        assert torch.equal(whole, wanted)
        empty = torch.zeros(0)
        optim.accumulate_([first, empty, second], [first, empty, second])  # its own, itself
        assert torch.equal(whole, 2 * wanted)
        third = torch.zeros(10)
        optim.accumulate_([third, torch.zeros(10)], [second, second])  # between gradients: free
        assert torch.equal(third, second)

    @pytest.mark.parametrize("transposed", [False, True])  # a copy would be read, too
    @pytest.mark.parametrize("name", ["into", "grads"])
    def test_storage_that_was_cut(self, name: str, transposed: bool) -> None:
        lists = {"into": [torch.zeros(3), torch.zeros(60, 60)]}
        lists["grads"] = [
            torch.ones(3),
            torch.ones(60, 60).t() if transposed else torch.ones(60, 60),
        ]
        lists[name][1].untyped_storage().resize_(4000)
        message = rf"{name}\[1\]: expected a storage of at least 14400 bytes, got 4000"
        with pytest.raises(ValueError, match=message):
            optim.accumulate_(lists["into"], lists["grads"])
        assert not lists["into"][0].any()

    @pytest.mark.parametrize("lists", [([], []), ([torch.zeros(3)], [None])])
    def test_backend_of_a_call_without_gradients(self, lists: Any) -> None:
        with pytest.raises(ValueError, match="backend: expected None or 'triton', got 'foo'"):
            optim.accumulate_(*lists, backend="foo")


@pytest.mark.parametrize("given", [False, True])  # gradients that lie elsewhere
@pytest.mark.parametrize("cls", [optim.Adam, optim.SGD])
def test_a_step_that_fails_makes_no_state(cls: Any, given: bool) -> None:
    """SGD's first update takes the gradient undamped, also after a step that failed."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    damped = {"momentum": 0.9, "dampening": 0.5} if cls is optim.SGD else {}
    optimizer = cls(groups, lr=0.1, **damped)
    grads = [torch.ones(3), torch.ones(3), torch.ones(3).to_sparse()]
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if given else grad
    with pytest.raises(TypeError, match="expected a dense gradient"):
        optimizer.step_with(dict(zip(params, grads, strict=True))) if given else optimizer.step()
    assert not optimizer.state
    if given:
        optimizer.step_with({params[0]: grads[0]})
    else:
        params[1].grad = params[2].grad = None
        optimizer.step()
    torch.testing.assert_close(params[0].data, torch.full((3,), 0.9))
