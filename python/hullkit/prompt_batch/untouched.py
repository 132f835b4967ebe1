# SPDX-License-Identifier: Apache-2.0
"""Blocks of the caller's, which are to leave a batch's base model as it is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..finetune.frozen_writes import of_write
from ..finetune.snapshot import (
    Attributes,
    configurations,
    geometry_of,
    put_back,
    put_memory_back,
    without_parametrised,
)
from ..native.kernels import DictCopies
from .borrowed import Borrowed


class BaseWritten(RuntimeError):
    """A block wrote to a parameter of the base model, of which there is no copy."""


class Base:
    """A batch's model, as it is watched through blocks.

    What blocks leave as it was, the list of modules and their dicts, is kept from one to the next:
    making it takes longer than seeing that it is the same.
    """

    def __init__(self) -> None:
        self._structure: _Structure | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies of a batch have a model of their own."""
        return Base, ()

    @contextmanager
    def untouched(self, block: Borrowed) -> Iterator[None]:
        """A block within `block`, after which modules and parameters are as before.

        Raises:
            RuntimeError: it has replaced, moved, added or removed one. It is as before.
            BaseWritten: it has written to a parameter.
        """
        modules = block.modules
        if self._structure is None or not self._structure.is_of(modules):
            self._structure = _Structure(modules)
        before = _Before(self._structure, block.parameters)
        handled = sys.exc_info()[1]  # of a caller that opens the block in an `except`
        yield
        changed, written = before.put_back()
        raised = sys.exc_info()[1]  # `block` hands nobody within it the error that ended it
        if raised is handled:
            raised = None
        if written and (raised is None or isinstance(raised, Exception)):
            raise BaseWritten(
                "then, slot(): expected a block that only reads the base model, got "
                + of_write(modules[0], written[0])
            )
        if changed is not None and raised is None:
            raise RuntimeError(
                f"{changed}: expected a block that leaves the base model as it is, got one that "
                "replaced, moved, added or removed it; the model is as before again"
            )


class _Structure:
    """Modules, their classes, and which parameters and modules they have. The model is first."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.with_buffers = [m for m in modules if m._buffers]
        # What resizes an embedding writes the new size there, too.
        self.with_sizes = [m for m in modules if isinstance(m, nn.Embedding) or m is modules[0]]
        self.configurations = configurations(modules)
        self._classes = [*map(type, modules)]
        self._entries = DictCopies([d for m in modules for d in (m._parameters, m._modules)])
        # Containers take a new dict as they lose a module.
        self._dicts = [(m, m._modules) for m in modules if m._modules]

    @property
    def classes(self) -> Iterator[tuple[nn.Module, type]]:
        return zip(self.modules, self._classes, strict=True)

    def is_of(self, modules: list[nn.Module]) -> bool:
        """Whether it is that of these modules as they are now."""
        return (
            self.modules == modules
            and self._classes == [*map(type, modules)]
            and not self._entries.changed()
            and all(m._modules is parts for m, parts in self._dicts)
        )

    def put_back(self) -> list[tuple[dict[str, Any], str]]:
        """Returns dicts and keys that were changed."""
        found = []
        for now, saved in self._entries.changed():
            # A parametrisation of one pass leaves its parameter in another place of the dict.
            keys = [k for k in {**saved, **now} if now.get(k, now) is not saved.get(k, saved)]
            found += [(now, key) for key in keys]
        put_back(self._entries)
        for module, parts in self._dicts:
            if module._modules is not parts:
                module._modules = parts
                found.append((parts, next(iter(parts))))
        for module, kind in self.classes:
            if type(module) is not kind:  # parametrised
                module.__class__ = kind
        return found

    def name(self, owner: dict[str, Any], key: str) -> str:
        for path, module in self.modules[0].named_modules():
            if any(d is owner for d in (module._parameters, module._modules, module._buffers)):
                return f"{path}.{key}".lstrip(".")
        return key


class _Before:
    """A model before a block, without copies of values."""

    def __init__(self, structure: _Structure, parameters: list[nn.Parameter]) -> None:
        self._structure = structure
        self._model = structure.modules[0]
        self._parameters = parameters
        self._data = [p.data for p in parameters]
        self._versions = _versions(parameters)
        self._buffers = DictCopies([m._buffers for m in structure.with_buffers])
        self._sizes = Attributes(structure.with_sizes)
        self._configurations = DictCopies(structure.configurations)

    def put_back(self) -> tuple[str | None, list[Tensor]]:
        """Puts back all but values.

        Returns the name of something that was changed and is as before, and the parameters whose
        values are not.
        """
        moved = self._moved()
        memories = {id(p) for p, _ in moved}
        written = self._written(memories)
        entries = self._structure.put_back() + self._cast_buffers()
        for parameter, data in moved:
            put_memory_back(parameter, data)
        if not (moved or entries):
            return None, written
        self._sizes.restore()
        put_back(self._configurations)
        names = [name for name, p in self._model.named_parameters() if id(p) in memories]
        return [*names, *(self._structure.name(*entry) for entry in entries)][0], written

    def _written(self, moved: set[int]) -> list[Tensor]:
        """Parameters with other values. Memory that was replaced has its former ones."""
        versions = _versions(self._parameters)
        if versions == self._versions:
            return []
        found: list[Tensor] = [
            parameter
            for parameter, was, now in zip(self._parameters, self._versions, versions, strict=True)
            if was != now and id(parameter) not in moved
        ]
        # RWKV's first forward in eval mode divides its weights by powers of two.
        rescaled = (m for m in self._structure.modules if "layers_are_rescaled" in vars(m))
        own = {id(p) for m in rescaled for p in m.parameters()}
        found = without_parametrised(found, self._structure.classes)
        return [parameter for parameter in found if id(parameter) not in own]

    def _moved(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Parameters with another memory or form than before, and that memory."""
        try:
            if all(map(Tensor.is_set_to, self._parameters, self._data)):
                return []
        except NotImplementedError:
            pass  # some are on the meta device by now
        # Quantised weights of other classes move their memory in their own forwards.
        return [
            (parameter, data)
            for parameter, data in zip(self._parameters, self._data, strict=True)
            if type(parameter) is nn.Parameter and geometry_of(parameter) != geometry_of(data)
        ]

    def _cast_buffers(self) -> list[tuple[dict[str, Any], str]]:
        """Puts back buffers that a block has cast, moved or removed. Forwards may replace them."""
        found = []
        for now, saved in self._buffers.changed():
            for key, buffer in saved.items():
                present = now.get(key)
                if buffer is not None and (present is None or _kind(present) != _kind(buffer)):
                    now[key] = buffer
                    found.append((now, key))
        return found


def _versions(parameters: list[nn.Parameter]) -> list[int | None]:
    try:
        return [p._version for p in parameters]
    except RuntimeError:  # tensors of inference mode count no writes
        return [None if p.is_inference() else p._version for p in parameters]


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device
