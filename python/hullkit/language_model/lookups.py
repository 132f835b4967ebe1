# SPDX-License-Identifier: Apache-2.0
"""Integer inputs by which a forward looks up rows: of positions, of token types, of languages.

On a GPU an index outside a table ends the process. Only the forward knows the table of an input,
and what it adds to the input first. So the check looks at every lookup of a forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .interface import MODEL_ERRORS, device_of, trial
from .pass_modes import PassMode

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
    return _Lookups(found) if found else nullcontext()


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
        new = [key for key, own in ranges.items() if not _within(own, self._known.get(key))]
        if not new:
            return False
        lookups = _Lookups({f"{name}[{key!r}]": value for key, value in found.items()})
        apart = trial(device_of(self._model, inputs["input_ids"]))
        complete = False
        # Another error is that of the pass, which comes next and knows what to do about it.
        with suppress(*MODEL_ERRORS), torch.no_grad(), apart, lookups:
            run(dict(inputs))
            complete = True
        if lookups.refused is not None:
            raise ValueError(lookups.refused)
        for key, (low, high) in ranges.items() if complete else ():
            least, most = self._known.get(key, (low, high))
            self._known[key] = min(least, low), max(most, high)
        return True


class _Lookups(PassMode):
    """Raises ValueError in a lookup outside its table.

    inputs: by their names, which may have led to the index.
    refused: the error's words.
    """

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._inputs = inputs
        self.refused: str | None = None

    def handle(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        signature = _BY_INDEX.get(func)
        if func is Tensor.__getitem__:
            self._check(_by_key(*args))
        elif signature is not None:
            given = dict(zip(signature.names, args, strict=False)) | kwargs
            index, dim = given.get(signature.indices), given.get("dim", 0)
            table = given.get(signature.table)
            # A table without dimensions has no rows, and its index is nobody's input.
            if isinstance(table, Tensor) and isinstance(index, Tensor) and table.ndim > 0:
                self._check([(index, 0, table.shape[0 if dim is None else dim])])
        return func(*args, **kwargs)

    def _check(self, lookups: list[tuple[Tensor, int, int]]) -> None:
        """lookups: an index, the least that it may be, and the end of the table."""
        for index, least, end in lookups:
            if index.numel() == 0 or (index.is_cuda and torch.cuda.is_current_stream_capturing()):
                continue  # what is captured ran before
            try:
                low, high = _range(index)
            except RuntimeError:  # a function that is mapped over rows has no values
                continue
            if low < least or high >= end:
                self.refused = self._words(least, end, low if low < least else high)
                raise ValueError(self.refused)

    def _words(self, least: int, end: int, got: int) -> str:
        holding = [name for name, value in self._inputs.items() if bool((value == got).any())]
        names = " or ".join(holding or self._inputs)
        return f"{names}: expected indices in [{least}, {end}), the rows of a table, got {got}"


class _Signature(NamedTuple):
    """The first arguments of a function, and which of them are table and index."""

    names: tuple[str, ...]
    table: str
    indices: str


_EMBEDDING = _Signature(("input", "weight"), "weight", "input")
_ALONG = _Signature(("input", "dim", "index"), "input", "index")
_BY_INDEX: dict[Any, _Signature] = {
    F.embedding: _EMBEDDING,
    F.embedding_bag: _EMBEDDING,
    torch.embedding: _Signature(("weight", "indices"), "weight", "indices"),
    torch.index_select: _ALONG,
    Tensor.index_select: _ALONG,
    torch.gather: _ALONG,
    Tensor.gather: _ALONG,
}


def _by_key(table: Tensor, key: Any) -> list[tuple[Tensor, int, int]]:
    """The lookups of `table[key]`."""
    keys = key if isinstance(key, tuple) else (key,)
    taken = [_dimensions(one) for one in keys]
    found, dim = [], 0
    for one, own in zip(keys, taken, strict=True):
        if dim >= table.ndim:
            break  # torch has its own error
        if isinstance(one, Tensor) and one.dtype not in _MASKS and one.ndim > 0:
            found.append((one, -table.shape[dim], table.shape[dim]))
        dim += table.ndim - sum(taken) if one is Ellipsis else own
    return found


def _dimensions(key: Any) -> int:
    """How many dimensions an entry of a key takes."""
    if key is None or key is Ellipsis or isinstance(key, bool):
        return 0
    return key.ndim if isinstance(key, Tensor) and key.dtype in _MASKS else 1


def _range(values: Tensor) -> tuple[int, int]:
    low, high = torch.stack(torch.aminmax(values)).tolist()
    return low, high


def _within(own: tuple[int, int], known: tuple[int, int] | None) -> bool:
    return known is not None and known[0] <= own[0] and own[1] <= known[1]
