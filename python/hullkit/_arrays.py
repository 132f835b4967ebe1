# SPDX-License-Identifier: Apache-2.0
"""Arrays of other libraries in the public functions: tensors on the way in, arrays on the way out.

NumPy arrays are taken as they lie in memory, read-only ones too: no kernel writes to its inputs.
Any other library's come and go through DLPack (CuPy, JAX, ...), on the device they are on.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ParamSpec, Protocol, TypeVar, cast, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils import dlpack

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class TakesArrays(Protocol[P, R_co]):
    """What type checkers know of such a function: its own arguments, or arrays in their place."""

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...

    @overload
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def takes_arrays(function: Callable[P, R]) -> TakesArrays[P, R]:
    """`function` of tensors, for arrays of any one library as well: results are in kind.

    Its first argument says which library. Tensors pass with one look at it.
    """
    parameters = inspect.signature(function).parameters
    names = tuple(parameters)
    tensors = {name for name in names if "Tensor" in str(parameters[name].annotation)}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args else kwargs.get(names[0])
        if isinstance(first, Tensor) or not (args or names[0] in kwargs):
            return function(*args, **kwargs)
        if not is_array(first):
            raise TypeError(
                f"{names[0]}: expected a torch.Tensor or an array (NumPy's, or one with "
                f"__dlpack__), got {_kind(first)}"
            )
        library = _library(names[0], first)

        def array(name: str, value: Any) -> Tensor:
            if not is_array(value) or _library(name, value) is not library:
                raise TypeError(
                    f"{name}: expected an array of {names[0]}'s kind, {_kind(first)}, "
                    f"got {_kind(value)}"
                )
            return tensor_of(name, value)

        def convert(name: str, value: Any) -> Any:
            if is_array(value) or (name in tensors and value is not None):
                return array(name, value)
            if not (hasattr(value, "indices") and hasattr(value, "weights")):
                return value  # `function` says what is wrong
            # A result of frank_wolfe, or what its caller made in its place.
            indices = array(f"{name}.indices", value.indices)
            weights = array(f"{name}.weights", value.weights)
            return SimpleNamespace(indices=indices, weights=weights)

        positional: Any = map(convert, names, args)
        keywords: Any = {name: convert(name, value) for name, value in kwargs.items()}
        result: R = _in_kind(function(*positional, **keywords), library)
        return result

    return cast("TakesArrays[P, R]", call)


def is_array(value: Any) -> bool:
    """Whether `value` is a tensor or an array of another library."""
    return isinstance(value, np.ndarray) or (
        hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__")
    )


def tensor_of(name: str, array: Any) -> Tensor:
    """A tensor on the memory of `array`, or TypeError.

    Copied are only NumPy views that go backwards or step by parts of an element.
    """
    refuse_mask(name, array)
    try:
        return _from_numpy(array) if isinstance(array, np.ndarray) else dlpack.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(
            f"{name}: expected an array that torch can read in place, got {_kind(array)} "
            f"of dtype {getattr(array, 'dtype', 'unknown')} ({error})"
        ) from error


def refuse_mask(name: str, value: Any) -> None:
    """TypeError for a masked array: a tensor has no mask, and would show what lies under it."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name}: expected an array without a mask, got {_kind(value)}. Pass "
            f"{name}.filled(value) (-1 for candidates that are none), or {name}.data if nothing is "
            "masked"
        )


def to_numpy(name: str, value: Any, dtype: Any = None) -> Any:
    """`numpy.asarray`, which forgets masks, for what has none. bfloat16 becomes float32."""
    refuse_mask(name, value)
    if isinstance(value, Tensor) and value.dtype is torch.bfloat16:
        value = value.detach().float()
    return np.asarray(value, dtype=dtype)


def _from_numpy(array: Any) -> Tensor:
    if not array.flags.c_contiguous and any(
        stride < 0 or stride % array.itemsize for stride in array.strides
    ):
        array = array.copy()
    if array.dtype.kind == "V" and array.dtype.name == "bfloat16":  # ml_dtypes', unknown to torch
        return _from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    if not array.flags.writeable:  # torch.from_numpy warns, and a copy would cost a pass
        array = np.asarray(_Writable(array))
    return torch.from_numpy(array)


class _Writable:
    """The memory of a read-only array, said to be writable."""

    def __init__(self, array: Any) -> None:
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}
        self._owner = array


def _library(name: str, array: Any) -> Any:
    """The namespace of an array: what makes arrays of its kind out of tensors."""
    if isinstance(array, np.ndarray):  # before NumPy 2 it cannot be asked
        return np
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    module = sys.modules[type(array).__module__.partition(".")[0]]
    if not hasattr(module, "from_dlpack"):
        raise TypeError(
            f"{name}: expected an array whose library can take the results (from_dlpack, found "
            f"with __array_namespace__), got {_kind(array)}"
        )
    return module


def _in_kind(result: Any, library: Any) -> Any:
    if isinstance(result, Tensor):
        return result.numpy() if library is np else library.from_dlpack(result)
    if isinstance(result, tuple):  # the public results are named tuples, some within others
        return type(result)(*(_in_kind(value, library) for value in result))
    return result


def _kind(value: Any) -> str:
    library = type(value).__module__.partition(".")[0]
    name = type(value).__qualname__
    return name if library == "builtins" else f"{library}.{name}"
