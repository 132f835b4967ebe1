# SPDX-License-Identifier: Apache-2.0
"""A snapshot of everything that a query may change in a model, and the restoring."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import bytes_reached, has_memory
from ..native.kernels import DictCopies
from .base_weights import Weights, pinned_like


class Snapshot:
    """The state of a model before a query. `restore` may be cut short and called again.

    place: "device" or "host", where copies of trained parameters lie.
    weights: has its own copies of trained parameters, for captured passes.
    """

    def __init__(
        self,
        modules: list[nn.Module],
        parameters: list[nn.Parameter],
        buffers: list[Tensor],
        place: str,
        weights: Weights | None,
    ) -> None:
        self._classes = [(m, type(m)) for m in modules]
        # That class has a property for each parametrised tensor, which goes with it.
        parametrised = {type(m) for m in modules if "parametrizations" in m._modules}
        self._properties = [(kind, _properties(kind)) for kind in parametrised]
        # Code in the block may replace a buffer instead of writing to it, so slots are kept too.
        self._training: dict[int, tuple[bool, list[nn.Module]]] = {}
        for m in modules:
            self._training.setdefault(id(m.training), (m.training, []))[1].append(m)
        self._buffer_slots = DictCopies([m._buffers for m in modules])
        self._slots = DictCopies([slots for m in modules for slots in (m._parameters, m._modules)])
        self._attributes = Attributes(modules)
        self._configurations = DictCopies(configurations(modules))
        self._replaced = False  # whether a parameter, its memory or a module was
        known = {*map(id, parameters), *map(id, buffers)}
        others = [t for t in self._attributes.tensors if id(t) not in known]
        leaves = [t for t in others if t.requires_grad and t.is_leaf]
        self._flags = [(p, p.requires_grad, p.grad) for p in (*parameters, *leaves)]
        # Tied parameters and shared buffers appear once. `data` keeps dtype, device and storage in
        # case the block moves or casts the model. Values are copied only where training may write.
        self._tensors: list[tuple[Tensor, Tensor, tuple[Any, ...], Tensor | None]] = []
        self._weights = weights
        elsewhere = set() if weights is None else set(map(id, weights.parameters))
        for p in parameters:
            data = p.data
            copied = p.requires_grad and id(p) not in elsewhere
            self._tensors.append(
                (p, data, geometry_of(p), _copy(_written(data), place) if copied else None)
            )
        # Tensors of inference mode count no writes.
        self._frozen = [
            (p, p._version, geometry)
            for p, _, geometry, copy in self._tensors
            if copy is None and id(p) not in elsewhere and not p.is_inference()
        ]
        self._written: list[Tensor] = []
        others = [t for t in others if _has_values(t)]
        self._buffers = [(b, _written(b.data).clone()) for b in (*buffers, *others)]
        self._tensors += [(b, b.data, geometry_of(b), copy) for b, copy in self._buffers]
        if weights is not None:
            weights.save()

    def drop_gradients(self) -> None:
        for tensor, _, grad in self._flags:
            if grad is not None:
                tensor.grad = None

    def restore_state(self) -> None:
        """Restores buffers and attributes, after passes that only prepared others."""
        put_back(self._buffer_slots)
        self._attributes.restore()
        for buffer, copy in self._buffers:
            _write(buffer, copy)

    def take_written(self) -> list[Tensor]:
        """Parameters without a copy that were written to in place, each told once.

        Writes to `.data` are not seen. Memory that was replaced has its former values.
        """
        self._note_written()
        written, self._written = self._written, []
        return written

    def _note_written(self) -> None:
        written = [
            parameter
            for parameter, version, geometry in self._frozen
            if not parameter.is_inference()  # swapped for one
            and parameter._version != version
            and geometry_of(parameter) == geometry
        ]
        if not written:
            return
        told = set(map(id, written))
        self._frozen = [entry for entry in self._frozen if id(entry[0]) not in told]
        self._written += without_parametrised(written, self._classes)

    def restore(self) -> Exception | None:
        """Restores everything. Returns the first error, after which the rest was still restored."""
        failures: list[Exception] = []
        _twice(failures, self._note_written)  # first: what was replaced looks as it did afterwards
        self._frozen = []
        for module, kind in self._classes:  # parametrisations give a module a class of its own
            if type(module) is not kind:
                _twice(failures, setattr, module, "__class__", kind)
        for kind, properties in self._properties:
            _twice(failures, _restore_properties, kind, properties)
        self._replaced = self._replaced or bool(self._slots.changed())
        put_back(self._slots)
        put_back(self._buffer_slots)
        self._restore_training()
        _twice(failures, self._attributes.restore)
        for tensor, data, geometry, copy in self._tensors:
            _twice(failures, self._restore, tensor, data, geometry, copy)
        if self._replaced:
            put_back(self._configurations)
        if self._weights is not None:
            _twice(failures, self._weights.restore)
        self._restore_flags(failures)
        return failures[0] if failures else None

    def restore_all_but_values(self) -> Exception | None:
        """Restores training flags, `requires_grad` and gradients. `restore` may follow."""
        failures: list[Exception] = []
        self._restore_training()
        self._restore_flags(failures)
        return failures[0] if failures else None

    def _restore_training(self) -> None:
        for training, modules in self._training.values():
            for module in modules:
                if module.training is not training:
                    set_training(module, training)

    def _restore_flags(self, failures: list[Exception]) -> None:
        for tensor, requires_grad, grad in self._flags:
            if tensor.requires_grad != requires_grad:
                _twice(failures, tensor.requires_grad_, requires_grad)
            if tensor.grad is not grad:
                _twice(failures, setattr, tensor, "grad", grad)

    def _restore(
        self, tensor: Tensor, data: Tensor, geometry: tuple[Any, ...], copy: Tensor | None
    ) -> None:
        if geometry_of(tensor) != geometry:
            self._replaced = True
            if copy is not None and not has_memory(data):  # the block freed it, as FSDP does
                data.untyped_storage().resize_(bytes_reached(data))
            put_memory_back(tensor, data)
        if copy is not None:
            _write(tensor, copy)


class Attributes:
    """The other attributes of modules: neither parameters, buffers nor modules.

    Tensors and Python's containers are looked into. Any other object is kept as it is.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules = DictCopies([m.__dict__ for m in modules])
        self._empty: list[Any] = []  # containers, most of which stay as they are
        self._containers: list[tuple[Any, Any]] = []
        self._bytes: list[tuple[bytearray, bytearray]] = []
        tensors: dict[int, Tensor] = {}
        dicts: list[dict[Any, Any]] = []
        seen: set[int] = set()  # containers, all of which are kept alive
        waiting = self._modules.values(_PLAIN, _MODULES_OWN)
        while waiting:
            value = waiting.pop()
            kind = type(value)
            if isinstance(value, Tensor):
                tensors[id(value)] = value
            elif kind in _CONTAINERS and id(value) not in seen:
                seen.add(id(value))
                if not value:
                    self._empty.append(value)
                    continue
                if kind in _DICTS:
                    dicts.append(value)
                else:
                    self._containers.append((value, value.copy()))
                inner = value.values() if isinstance(value, dict) else value
                waiting += [x for x in inner if type(x) not in _PLAIN]
            elif kind is bytearray:
                self._bytes.append((value, value.copy()))
            elif kind is tuple or (isinstance(value, tuple) and hasattr(kind, "_fields")):
                waiting += [x for x in value if type(x) not in _PLAIN]
        self._dicts = DictCopies(dicts)
        self.tensors = list(tensors.values())

    def restore(self) -> None:
        """Restores names and contents. The snapshot restores the values of tensors."""
        for now, saved in self._modules.changed():
            for name in [n for n in now if n not in saved and n not in _MODULES_OWN]:
                del now[name]
            for name, value in saved.items():
                if name not in _LEFT_ALONE and now.get(name, now) is not value:
                    now[name] = value
        put_back(self._dicts)
        for container in self._empty:
            if container:
                container.clear()
        for now, saved in self._containers:
            if isinstance(now, OrderedDict):
                if not (_same_objects(now, saved) and _same_objects(now.values(), saved.values())):
                    now.clear()
                    now.update(saved)
            elif isinstance(now, set):
                if now != saved:
                    now.clear()
                    now.update(saved)
            elif not _same_objects(now, saved):
                now.clear()
                now.extend(saved)
        # Last: a bytearray refuses another length while somebody holds a view of it.
        for bytes_now, bytes_saved in self._bytes:
            if bytes_now != bytes_saved:
                bytes_now[:] = bytes_saved


# Attributes that every module has (slots, hooks), and the one that `Module.compile` adds.
_MODULES_OWN = frozenset(nn.Module().__dict__.keys() - {"_non_persistent_buffers_set"}) | {
    "_compiled_call_impl"
}
# Containers take a new dict as they lose a module.
_LEFT_ALONE = _MODULES_OWN - {"_parameters", "_buffers", "_modules"}
_PLAIN = {int, float, bool, str, type(None), type, frozenset, torch.dtype, torch.device}
_DICTS = {dict, defaultdict, Counter}  # whose order DictCopies sees
_CONTAINERS = {list, set, OrderedDict, deque, *_DICTS}


def put_back(copies: DictCopies) -> None:
    for now, saved in copies.changed():
        now.clear()
        now.update(saved)


def configurations(modules: list[nn.Module]) -> list[dict[str, Any]]:
    """What configurations keep. What resizes an embedding writes the new size there."""
    found = {id(one): one for one in (m.__dict__.get("config") for m in modules)}
    return [vars(c) for c in found.values() if isinstance(getattr(c, "__dict__", None), dict)]


def set_training(module: nn.Module, training: bool) -> None:
    """Past the `__setattr__` of modules, which looks for parameters, buffers and modules first. A
    model with adapters has thousands of modules."""
    object.__setattr__(module, "training", training)


def _same_objects(now: Collection[Any], saved: Collection[Any]) -> bool:
    """Whether both have the very same objects in one order."""
    return len(now) == len(saved) and all(map(is_, now, saved))


def _twice(failures: list[Exception], restore: Callable[..., Any], *arguments: Any) -> None:
    """Calls again after an error, which another thread may have raised in this one."""
    try:
        restore(*arguments)
    except Exception:
        try:
            restore(*arguments)
        except Exception as error:
            failures.append(error)


def _properties(kind: type) -> dict[str, property]:
    """The properties of the class itself, without its bases'."""
    return {name: value for name, value in vars(kind).items() if isinstance(value, property)}


def _restore_properties(kind: type, saved: dict[str, property]) -> None:
    now = _properties(kind)
    for name in now.keys() - saved.keys():
        delattr(kind, name)
    for name, value in saved.items():
        if now.get(name) is not value:
            setattr(kind, name, value)


def put_memory_back(tensor: Tensor, data: Tensor) -> None:
    if tensor.is_meta and not data.is_meta:  # swapped for one that takes no such data
        torch.utils.swap_tensors(tensor, nn.Parameter(data, tensor.requires_grad))
    else:
        tensor.data = data


def without_parametrised(
    written: list[Tensor], classes: Iterable[tuple[nn.Module, type]]
) -> list[Tensor]:
    """Those of the tensors whose count of writes tells of one.

    A parametrisation sets a tensor to itself, which counts as a write. PEFT registers one in each
    pass for an adapter of a parameter, whose name it keeps, and removes it again.

    classes: the modules, each with its class before the writes.
    """
    set_to_itself = {
        id(parameter)
        for module, kind in classes
        if type(module) is not kind
        or "parametrizations" in module._modules
        or "parameter_name" in vars(module)
        for parameter in module.parameters()
    }
    return [tensor for tensor in written if id(tensor) not in set_to_itself]


def _write(tensor: Tensor, copy: Tensor) -> None:
    # A tensor made in inference mode can be written to in that mode only.
    with torch.inference_mode() if tensor.is_inference() else torch.no_grad():
        _written(tensor).copy_(copy)


def tensors_of(modules: list[nn.Module]) -> tuple[list[nn.Parameter], list[Tensor]]:
    """All parameters and buffers, tied and shared ones once."""
    parameters = {id(p): p for m in modules for p in m._parameters.values() if p is not None}
    buffers = {id(b): b for m in modules for b in m._buffers.values() if b is not None}
    return list(parameters.values()), list(buffers.values())


def _has_values(tensor: Tensor) -> bool:
    """Whether the tensor has values to restore: autograd did not compute it, and it has memory."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.grad_fn is None
        and tensor.layout is torch.strided
        and tensor.device.type != "meta"
        and has_memory(tensor)
    )


def _copy(tensor: Tensor, place: str) -> Tensor:
    if place == "host" and tensor.device.type == "cuda":
        return pinned_like(tensor).copy_(tensor)
    return tensor.clone()


def geometry_of(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _written(tensor: Tensor) -> Tensor:
    """The tensor without the repetitions of an expanded tensor, which cannot be written to."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0:
            tensor = tensor.narrow(dim, 0, min(1, tensor.shape[dim]))
    return tensor
