# SPDX-License-Identifier: Apache-2.0
"""What a user may do to parameters, gradients, groups and state between two calls: the result is
torch's, whatever the tables of addresses were made for."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _cases import fixed
from _optim import KINDS, check_equal
from hullkit import optim
from hullkit.optim import _layouts
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

SHAPES = [(4, 4), (5,), (2, 3, 2), ()]
SPARE = (3, 2)  # of a parameter whose group is added later


# As torch is now, and as one without DLPack's C functions is.
PATHS = pytest.mark.parametrize("exchange", [True, False], ids=["dlpack", "plain"])


class Side:
    """One of two optimizers to which the same is done."""

    def __init__(self, cls: Any, dtype: torch.dtype, **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        made = [
            nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))
            for shape in [*SHAPES, SPARE]
        ]
        self.params, self.spare = made[:-1], made[-1:]
        self.optimizer = cls(
            [{"params": self.params[:2]}, {"params": self.params[2:], "lr": 0.02}], **options
        )

    def normal(self, seed: int, like: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    def reversed_axes(self, tensor: Tensor) -> Tensor:
        """The same values, laid out the other way round."""
        axes = list(range(tensor.ndim))[::-1]
        return tensor.permute(axes).contiguous().permute(axes)

    def each(self, param: Tensor, change: Callable[[Tensor], Tensor]) -> None:
        for value in self.optimizer.state.get(param, {}).values():
            if isinstance(value, Tensor):
                value.data = change(value)

    def follow(self) -> None:
        """The parameters of an optimizer that is a copy."""
        self.params = [p for group in self.optimizer.param_groups for p in group["params"]]

    # Gradients.

    def new_grad(self, param: Tensor, seed: int) -> None:
        param.grad = self.normal(seed, param)

    def new_grads(self, param: Tensor, seed: int) -> None:
        for place, each in enumerate(self.params):
            self.new_grad(each, seed + place)

    def other_layout_grad(self, param: Tensor, seed: int) -> None:
        param.grad = None  # its memory may be given out again
        param.grad = self.reversed_axes(self.normal(seed, param))

    def expanded_grad(self, param: Tensor, seed: int) -> None:
        param.grad = torch.full((), seed / 100.0, dtype=param.dtype).expand(param.shape)

    def turned_grad(self, param: Tensor, seed: int) -> None:
        if param.grad is not None and param.ndim == 2 and param.shape[0] == param.shape[1]:
            param.grad.t_()

    def viewed_grad(self, param: Tensor, seed: int) -> None:
        if param.grad is not None and param.ndim == 2 and param.shape[0] == param.shape[1]:
            param.grad = param.grad.t()

    def negated_grad(self, param: Tensor, seed: int) -> None:
        imag = self.normal(seed, param)
        param.grad = torch.complex(imag, imag).conj().imag

    def no_grad(self, param: Tensor, seed: int) -> None:
        param.grad = None

    def zeroed(self, param: Tensor, seed: int) -> None:
        self.optimizer.zero_grad(set_to_none=seed % 2 == 0)

    # Parameters.

    def cloned(self, param: Tensor, seed: int) -> None:
        param.data = param.data.clone()

    def relaid(self, param: Tensor, seed: int) -> None:
        param.data = self.reversed_axes(param.data)

    def turned(self, param: Tensor, seed: int) -> None:
        if param.ndim == 2 and param.shape[0] == param.shape[1]:
            param.data = param.data.t()

    def cut(self, param: Tensor, seed: int) -> None:
        if param.ndim and param.shape[0] > 1 and param.is_contiguous():  # else it has gaps then
            param.data, param.grad = param.data[:-1], None
            self.optimizer.state.pop(param, None)

    def freed_and_back(self, param: Tensor, seed: int) -> None:
        values, storage = param.data.clone(), param.untyped_storage()
        size = storage.nbytes()
        storage.resize_(0)
        storage.resize_(size)
        param.data.copy_(values)

    def replaced(self, param: Tensor, seed: int) -> None:
        """Another parameter in the same memory has no state yet."""
        other = nn.Parameter(param.data)
        other.grad = self.normal(seed, param)
        for group in self.optimizer.param_groups:
            group["params"] = [other if p is param else p for p in group["params"]]
        self.optimizer.state.pop(param, None)
        self.follow()

    def frozen(self, param: Tensor, seed: int) -> None:
        param.requires_grad_(not param.requires_grad)

    # Groups.

    def replaced_groups(self, param: Tensor, seed: int) -> None:
        self.optimizer.param_groups = [
            {**group, "lr": 0.001 * (seed % 7)} for group in self.optimizer.param_groups
        ]

    def options(self, param: Tensor, seed: int) -> None:
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.1 * (seed % 3)
            group["maximize"] = seed % 2 == 1
            if "betas" in group:
                group["betas"] = (0.8, 0.9 + 0.01 * (seed % 5))
            else:
                group["momentum"] = 0.5 if group["nesterov"] else 0.3 * (seed % 3)

    def lr_tensor(self, param: Tensor, seed: int) -> None:
        lr = torch.tensor(0.01 * (seed % 4), dtype=torch.float64)  # torch computes in its dtype
        self.optimizer.param_groups[seed % 2]["lr"] = lr

    def added_group(self, param: Tensor, seed: int) -> None:
        if self.spare:
            self.optimizer.add_param_group({"params": [*self.spare], "lr": 0.03})
            self.params, self.spare = [*self.params, *self.spare], []

    # State.

    def swapped_state(self, param: Tensor, seed: int) -> None:
        self.each(param, torch.clone)

    def relaid_state(self, param: Tensor, seed: int) -> None:
        self.each(param, self.reversed_axes)

    def turned_state(self, param: Tensor, seed: int) -> None:
        if param.ndim == 2 and param.shape[0] == param.shape[1]:
            self.each(param, lambda value: value.t() if value.ndim else value)

    def halved_state(self, param: Tensor, seed: int) -> None:
        self.each(param, lambda value: value.div_(2) if value.ndim else value)

    def no_state(self, param: Tensor, seed: int) -> None:
        self.optimizer.state.pop(param, None)

    def own_state(self, param: Tensor, seed: int) -> None:
        self.optimizer.load_state_dict(self.optimizer.state_dict())

    def copied_state(self, param: Tensor, seed: int) -> None:
        self.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))

    def copied(self, param: Tensor, seed: int) -> None:
        grads = [p.grad for p in self.params]
        self.optimizer = copy.deepcopy(self.optimizer)
        self._after_copy(grads)

    def pickled(self, param: Tensor, seed: int) -> None:
        grads = [p.grad for p in self.params]
        self.optimizer = pickle.loads(pickle.dumps(self.optimizer))
        self._after_copy(grads)

    def _after_copy(self, grads: list[Tensor | None]) -> None:
        self.follow()
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = None if grad is None else grad.clone()  # pickle leaves them behind

    def step(self, param: Tensor, seed: int) -> None:
        self.optimizer.step()


CHANGES = [name for name in vars(Side) if not name.startswith("_")]
CHANGES = [n for n in CHANGES if n not in ("normal", "reversed_axes", "each", "follow", "step")]
# A change, the parameter it is made to, and a number it may depend on; a step after some of them.
STORIES = st.lists(
    st.tuples(st.sampled_from(CHANGES), st.integers(0, 4), st.integers(1, 99), st.booleans()),
    min_size=1,
    max_size=10,
)
FOLLOWED = ["adam-l2-maximize", "adamw", "sgd", "sgd-dampened", "sgd-nesterov"]


def compare(kind: str, dtype: torch.dtype, story: Any) -> None:
    ours_cls, theirs_cls, options = KINDS[kind]
    ours = Side(ours_cls, dtype, **options)
    theirs = Side(theirs_cls, dtype, foreach=False, **options)
    sides = (ours, theirs)
    begin = ("new_grads", 0, 1, True)
    for name, place, seed, steps in [begin, begin, *story, ("new_grads", 0, 5, True)]:
        for side in sides:
            param = side.params[place % len(side.params)]
            getattr(side, name)(param, seed)
            if steps:
                side.step(param, seed)
        bound = 2e-6 if dtype is torch.float32 else 1e-12
        check_equal(ours.optimizer, ours.params, theirs.optimizer, theirs.params, bound)


@pytest.mark.parametrize("kind", FOLLOWED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@fixed(40)
@given(STORIES)
def test_any_change_between_steps(kind: str, dtype: torch.dtype, story: Any) -> None:
    compare(kind, dtype, story)


@PATHS
@pytest.mark.parametrize("kind", ["adamw", "sgd-dampened"])
@pytest.mark.parametrize("change", CHANGES)
def test_each_change(
    kind: str, change: str, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, made to every parameter."""
    if not exchange:
        monkeypatch.setattr(_layouts, "_exchange", None)
    compare(kind, torch.float64, [(change, place, 3 + place, True) for place in range(len(SHAPES))])


def test_retyped_parameters() -> None:
    """Values and gradients in another dtype at the next step, and state made anew."""
    sides = [Side(cls, torch.float32) for cls in (optim.AdamW, torch.optim.AdamW)]
    for side in sides:
        side.new_grads(side.params[0], 1)
        side.optimizer.step()
        for param in side.params:
            param.data, param.grad = param.data.double(), None
            side.no_state(param, 0)
        side.new_grads(side.params[0], 2)
        side.optimizer.step()
    ours, theirs = sides
    check_equal(ours.optimizer, ours.params, theirs.optimizer, theirs.params, 2e-6)


@PATHS
def test_what_lies_behind_a_cut_parameter(exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(_layouts, "_exchange", None)
    memory, grad = torch.zeros(6), torch.ones(6)
    param = nn.Parameter(memory)
    optimizer = optim.SGD([param], lr=1.0)
    param.grad = grad
    optimizer.step()
    param.data, param.grad = param.data[:3], None
    param.grad = grad[:3]
    optimizer.step()
    assert memory.tolist() == [-2.0] * 3 + [-1.0] * 3


@PATHS
def test_replaced_parameter_begins_anew(exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of its predecessor, in the same memory, is not its own."""
    if not exchange:
        monkeypatch.setattr(_layouts, "_exchange", None)
    results = []
    for cls in (optim.Adam, torch.optim.Adam):
        param = nn.Parameter(torch.ones(3))
        optimizer = cls([param], lr=0.5)
        for scale in (1.0, -4.0, 0.5):
            param.grad = torch.full((3,), scale)
            optimizer.step()
        param = nn.Parameter(param.data)
        optimizer.param_groups[0]["params"][0] = param
        param.grad = torch.full((3,), 0.25)
        optimizer.step()
        results.append([param.tolist(), optimizer.state[param]["step"].item()])
    assert results[0][0] == pytest.approx(results[1][0], rel=2e-6)
    assert results[0][1] == results[1][1] == 1


@PATHS
def test_gradient_that_lies_in_negatives(exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another object at the address of the last, of its size and strides, whose memory holds the
    negatives of its values."""
    if not exchange:
        monkeypatch.setattr(_layouts, "_exchange", None)
    param = nn.Parameter(torch.zeros(3))
    optimizer = optim.SGD([param], lr=1.0)
    memory = torch.ones(3)
    for negative in (False, True, False):
        param.grad = torch._neg_view(memory) if negative else memory.detach()
        optimizer.step()
    assert param.tolist() == [-1.0] * 3
    into = [torch.zeros(3)]
    for grad in (memory, torch._neg_view(memory), memory):
        optim.accumulate_(into, [grad])
    assert into[0].tolist() == [1.0] * 3


# accumulate_


def strided(tensor: Tensor) -> Tensor:
    """The same values with gaps between them."""
    wide = torch.zeros((*tensor.shape, 2), dtype=tensor.dtype)
    wide[..., 0] = tensor
    return wide[..., 0]


def reversed_axes(tensor: Tensor) -> Tensor:
    axes = list(range(tensor.ndim))[::-1]
    return tensor.permute(axes).contiguous().permute(axes)


GRADS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "same": lambda grad: grad,
    "new": torch.clone,
    "turned": lambda grad: grad.t() if grad.shape == (4, 4) else grad,
    "turned in place": lambda grad: grad.t_() if grad.shape == (4, 4) else grad,
    "reversed": reversed_axes,
    "strided": strided,
    "expanded": lambda grad: torch.full((), 0.5, dtype=grad.dtype).expand(grad.shape),
    "none": lambda grad: None,
    "double": lambda grad: grad.double(),
    "half": lambda grad: grad.half(),
    "negative": lambda grad: torch.complex(grad.float(), grad.float()).conj().imag,
}
INTO: dict[str, Callable[[Tensor], Tensor]] = {
    "same": lambda into: into,
    "view": lambda into: into.view_as(into),
    "new": torch.clone,
    "turned": lambda into: into.t() if into.shape == (4, 4) else into,
    "turned in place": lambda into: into.t_() if into.shape == (4, 4) else into,
    "reversed": reversed_axes,
    "cut": lambda into: into[:-1] if into.ndim and len(into) > 1 and into.is_contiguous() else into,
}


@PATHS
@fixed(150)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(list(GRADS)), st.sampled_from(list(INTO)), st.sampled_from([1.0, -0.5])
        ),
        min_size=1,
        max_size=8,
    )
)
def test_accumulate_after_any_change(exchange: bool, story: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if not exchange:
            patch.setattr(_layouts, "_exchange", None)
        generator = torch.Generator().manual_seed(0)
        into = [torch.randn(shape, generator=generator) for shape in SHAPES]
        grads: list[Any] = [torch.randn(shape, generator=generator) for shape in SHAPES]
        for of_grads, of_into, weight in [("same", "same", 1.0), *story, ("same", "same", 1.0)]:
            into = [INTO[of_into](tensor) for tensor in into]
            changed = [GRADS[of_grads](grad) for grad in grads]
            kept = [old if new is None else new for old, new in zip(grads, changed, strict=True)]
            grads = [
                grad if grad.shape == a.shape else grad[: len(a)]
                for grad, a in zip(kept, into, strict=True)
            ]
            given = [None, *grads[1:]] if of_grads == "none" else list(grads)
            wanted = [tensor.clone() for tensor in into]
            pairs = [(a, g) for a, g in zip(wanted, given, strict=True) if g is not None]
            torch._foreach_add_([a for a, _ in pairs], [g.float() for _, g in pairs], alpha=weight)
            optim.accumulate_(into, given, weight)
            for tensor, right in zip(into, wanted, strict=True):
                torch.testing.assert_close(tensor, right, rtol=1e-6, atol=1e-6)


def test_accumulate_refuses_another_shape_later() -> None:
    into, grad = torch.zeros(2, 3), torch.ones(2, 3)
    optim.accumulate_([into], [grad])
    with pytest.raises(ValueError, match=r"grads\[0\]: expected shape \(2, 3\).*got \(3, 2\)"):
        optim.accumulate_([into], [grad.view(3, 2)])
    assert into.tolist() == [[1.0] * 3] * 2
