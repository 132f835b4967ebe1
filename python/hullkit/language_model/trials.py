# SPDX-License-Identifier: Apache-2.0
"""Trying a module, perhaps with small random layers as its parts, to find what it computes."""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_DEEPEST = 4  # containers within containers
_MOST = 1000  # items of a module's attributes
_PLAIN = {int, float, complex, str, bytes, bool, type(None)}
_CONTAINERS = (list, tuple, set, frozenset, dict)
_OPAQUE = (nn.Module, type, FunctionType, MethodType, ModuleType)  # no content is looked at


def random_linear(columns: int, rows: int, random: torch.Generator) -> nn.Linear:
    """A layer without a bias, whose weight has elements of about 1."""
    # On the CPU its weight would begin with numbers of torch's own stream, which is the caller's.
    layer = nn.Linear(columns, rows, bias=False, device="meta", dtype=torch.float32)
    layer.weight = nn.Parameter(random_tensor(random, rows, columns))
    return layer


def random_tensor(random: torch.Generator, *shape: int) -> Tensor:
    """float32 on the CPU, whatever torch makes tensors of by default. Elements are about 1."""
    return torch.randn(shape, generator=random, dtype=torch.float32, device="cpu")


def column(numbers: Sequence[float]) -> Tensor:
    """A factor for each row, float32 on the CPU."""
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")[:, None]


@contextmanager
def plain_modes() -> Iterator[None]:
    """A block for trials and their formulas, whatever modes and hooks of torch a pass is in."""
    kept = torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)
    off = torch.autocast("cpu", enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), kept, off:
        yield


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class LeftSomething(Exception):
    """A forward that was tried left something behind: whoever reads that would miss it.

    That is a change of an attribute, or of the state of random numbers.
    """


@contextmanager
def _kept_random_numbers() -> Iterator[Callable[[], bool]]:
    """A block that leaves torch's random numbers as they were; yields whether some were drawn.

    A generator of a device tells its state without waiting, but not while a graph is captured.
    """
    generators = (torch.default_generator, *torch.cuda.default_generators)
    before = [(generator, generator.get_state()) for generator in generators]

    def used() -> list[tuple[torch.Generator, Tensor]]:
        return [(one, state) for one, state in before if not torch.equal(one.get_state(), state)]

    try:
        yield lambda: bool(used())
    finally:
        for generator, state in used():
            generator.set_state(state)


class Trial(NamedTuple):
    """What a forward returned.

    leaves: the input and the weights that it was given.
    """

    y: Tensor
    leaves: list[Tensor]

    def has_gradients_of(self, formula: Tensor, bound: float) -> bool:
        """Whether y's gradients by the leaves are those of a formula's result, made of them too.

        bound: of a row's difference, relative to the row.

        A forward can return the formula's value with other gradients: one that is detached, scaled,
        or passed straight through.
        """
        random = torch.Generator(device="cpu").manual_seed(1)
        # Along y itself, too: across it a norm's gradient hardly shows a detached root.
        direction = 0.1 * (random_tensor(random, *self.y.shape) + self.y.detach().float().sign())
        pairs = []
        for of in (self.y, formula):
            given = direction.to(of.dtype)
            pairs.append(torch.autograd.grad(of, self.leaves, given, allow_unused=True))
        for found, wanted in zip(*pairs, strict=True):
            if found is None or wanted is None:
                return False
            error = torch.linalg.vector_norm(found.double() - wanted.double(), dim=-1)
            if not bool((error <= bound * torch.linalg.vector_norm(wanted.double(), dim=-1)).all()):
                return False
        return True


def trial(
    module: nn.Module,
    x: Tensor,
    parts: Mapping[str, nn.Module] | None = None,
    parameters: Mapping[str, nn.Parameter] | None = None,
    *,
    writes: bool = False,
) -> Trial | None:
    """What the forward of the module's class makes of x, with these parts instead of its own.

    None if it fails, or returns no tensor like x but for the columns. Nobody who watches the module
    is told, and what it keeps in tensors, lists, sets and dicts stays as it is, as do torch's
    random numbers. Inside `plain_modes`, and not in a capture.

    writes: whether it may write to its input.

    Raises LeftSomething.
    """
    parts, parameters = parts or {}, parameters or {}
    x = x.detach().requires_grad_()
    copies: list[nn.Module] = []
    given, y = x.clone(), None
    with _kept_random_numbers() as were_drawn:
        try:
            tried = _copied(module, parts, copies)
            tried.__dict__["_parameters"] = {**module._parameters, **parameters}
            before = [facts(one) for one in copies]
            with suppress(Exception):
                y = type(module).forward(tried, given)
            changed = [facts(one) for one in copies] != before
        except Exception:
            return None
        if changed or were_drawn():
            raise LeftSomething
    if not isinstance(y, Tensor) or not y.requires_grad or (given._version > 0 and not writes):
        return None
    if y.dtype is not x.dtype or y.shape[:-1] != x.shape[:-1]:
        return None
    weights = [p for part in parts.values() for p in part.parameters()]
    return Trial(y, [x, *weights, *parameters.values()])


def _copied(
    module: nn.Module, parts: Mapping[str, nn.Module], copies: list[nn.Module]
) -> nn.Module:
    """A copy with copies of its parts, tensors and containers, which a forward may write to."""
    tried = copy.copy(module)
    copies.append(tried)
    for name, value in tried.__dict__.items():
        tried.__dict__[name] = _apart(value)
    for name in ("_parameters", "_buffers"):  # of classes of their own under some libraries
        held = getattr(module, name).items()
        tried.__dict__[name] = {key: _apart(value) for key, value in held}
    tried.__dict__["_modules"] = {
        name: parts.get(name) or (part if part is None else _copied(part, {}, copies))
        for name, part in module._modules.items()
    }
    return tried


def _apart(value: Any, depth: int = 0) -> Any:
    """Containers and tensors anew."""
    kind = type(value)  # an object may tell another class
    if issubclass(kind, Tensor):
        return value if issubclass(kind, nn.Parameter) else value.detach().clone()
    if depth < _DEEPEST and kind in (dict, OrderedDict):
        return kind((key, _apart(item, depth + 1)) for key, item in value.items())
    if depth < _DEEPEST and kind in (list, set):
        return kind(_apart(item, depth + 1) for item in value)
    return value


def facts(module: nn.Module, without: Collection[str] = ("_modules",)) -> tuple[Any, ...]:
    """Something that changes when an attribute of the module does, but for those named."""
    room = [_MOST]
    return tuple(
        (name, _fact(value, room)) for name, value in vars(module).items() if name not in without
    )


class Same:
    """Equal to what was made of the same object, while that lives. It does not keep it alive."""

    def __init__(self, value: Any) -> None:
        try:
            self._of: Any = weakref.ref(value)
        except TypeError:
            self._of = None
        self._kind, self._place = type(value), id(value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Same) or self._kind is not other._kind:
            return False
        if self._of is None or other._of is None:
            return self._of is other._of and self._place == other._place
        own = self._of()
        return own is not None and own is other._of()

    __hash__ = None  # type: ignore[assignment]


def _fact(value: Any, room: list[int], depth: int = 0) -> Any:
    """A value's part of `facts`. Deep containers, and those without room, count as objects."""
    kind = type(value)  # an object may tell another class
    if kind in _PLAIN:
        return kind, value
    if issubclass(kind, Tensor):
        return Same(value), None if value.is_inference() else value._version
    if depth < _DEEPEST and issubclass(kind, _CONTAINERS) and len(value) <= room[0]:
        room[0] -= len(value)
        items = chain.from_iterable(value.items()) if issubclass(kind, dict) else value
        return kind, tuple(_fact(item, room, depth + 1) for item in items)
    if depth == 0 and not issubclass(kind, _OPAQUE):
        try:
            content = vars(value)  # of a configuration, say
        except Exception:
            return Same(value)
        return Same(value), _fact(content, room, 1)
    return Same(value)
