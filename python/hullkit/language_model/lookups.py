# SPDX-License-Identifier: Apache-2.0
"""Integer inputs by which a forward looks up rows: of positions, of token types, of languages.

On a GPU an index outside a table ends the process. Only the forward knows the table of an input,
and what it adds to the input first. So the check looks at every lookup of a forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .interface import MODEL_ERRORS, device_of

_ATEN = torch.ops.aten
_MASKS = (torch.bool, torch.uint8)


def index_inputs(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inputs by which a forward may look up rows. Token ids and labels are checked elsewhere.

    This waits for the device of an attention mask.
    """
    found = {}
    for name, value in inputs.items():
        if name in ("input_ids", "labels") or not isinstance(value, Tensor) or value.ndim < 2:
            continue
        if value.is_floating_point() or value.dtype is torch.bool or value.numel() == 0:
            continue
        if name != "attention_mask" or _range(value) not in ((0, 0), (0, 1), (1, 1)):
            found[name] = value
    return found


def checked_lookups(inputs: Mapping[str, Any]) -> AbstractContextManager[object]:
    """A block in which a lookup outside its table raises ValueError, if inputs may lead to one.

    There every lookup waits for the device.
    """
    found = index_inputs(inputs)
    return _looked_at(_Lookups(found)) if found else nullcontext()


class KnownIndices:
    """The values of integer inputs that a model's forward has taken before: no need to try them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: dict[str, tuple[int, int]] = {}
        self._rows: list[int] = []

    def check(
        self, name: str, inputs: Mapping[str, Tensor], run: Callable[[dict[str, Tensor]], Any]
    ) -> bool:
        """Whether the model ran, as it does once for values that are new.

        name: of the example. run: the forward of inputs.

        Raises ValueError, which names the input, for an index outside a table.
        """
        found = index_inputs(inputs)
        if not found:
            return False
        rows = [len(p) for p in self._model.parameters() if p.ndim == 2]
        if rows != self._rows:  # a table may have been resized
            self._rows, self._known = rows, {}
        ranges = {key: _range(value) for key, value in found.items()}
        if all(_within(own, self._known.get(key)) for key, own in ranges.items()):
            return False
        lookups = _Lookups({f"{name}[{key!r}]": value for key, value in found.items()})
        device = device_of(self._model, inputs["input_ids"])
        devices = [device] if device.type == "cuda" else []
        complete = False
        # Another error is that of the pass, which comes next and knows what to do about it.
        with suppress(*MODEL_ERRORS), torch.no_grad(), torch.random.fork_rng(devices):
            with _looked_at(lookups):
                run(dict(inputs))
            complete = True
        if lookups.refused is not None:
            raise ValueError(lookups.refused)
        for key, (low, high) in ranges.items() if complete else ():
            least, most = self._known.get(key, (low, high))
            self._known[key] = min(least, low), max(most, high)
        return True


@contextmanager
def _looked_at(lookups: _Lookups) -> Iterator[None]:
    try:
        with lookups:
            yield
    finally:
        lookups.ended = True


class _Lookups(TorchDispatchMode):
    """Raises ValueError in a lookup outside its table.

    inputs: by their names, which may have led to the index.
    refused: the error's words. ended: a signal may leave the mode on torch's stack.
    """

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._inputs = inputs
        self.refused: str | None = None
        self.ended = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for index, least, end in () if self.ended else _indices(func, args):
            if index.is_cuda and torch.cuda.is_current_stream_capturing():
                continue  # the same forward ran before
            low, high = _range(index)
            if low < least or high >= end:
                self.refused = self._words(least, end, low if low < least else high)
                raise ValueError(self.refused)
        return func(*args, **kwargs or {})

    def _words(self, least: int, end: int, got: int) -> str:
        holding = [name for name, value in self._inputs.items() if bool((value == got).any())]
        names = " or ".join(holding or self._inputs)
        return f"{names}: expected indices in [{least}, {end}), the rows of a table, got {got}"


def _indices(func: Any, args: tuple[Any, ...]) -> list[tuple[Tensor, int, int]]:
    """The indices of a lookup, each with the least that it may be and the end of its table."""
    found: list[tuple[Tensor, int, int]] = []
    if func is _ATEN.embedding.default:
        found = [(args[1], 0, len(args[0]))]
    elif func in (_ATEN.index_select.default, _ATEN.gather.default) and args[0].ndim > 0:
        found = [(args[2], 0, args[0].shape[args[1]])]
    elif func is _ATEN.index.Tensor:
        dim = 0
        for index in args[1]:
            is_mask = index is not None and index.dtype in _MASKS
            if index is not None and not is_mask:
                end = args[0].shape[dim]
                found.append((index, -end, end))
            dim += index.ndim if is_mask else 1
    return [(index, least, end) for index, least, end in found if index.numel() > 0]


def _range(values: Tensor) -> tuple[int, int]:
    low, high = torch.stack(torch.aminmax(values)).tolist()
    return low, high


def _within(own: tuple[int, int], known: tuple[int, int] | None) -> bool:
    return known is not None and known[0] <= own[0] and own[1] <= known[1]
