# SPDX-License-Identifier: Apache-2.0
"""Entry points of torch that are not public, each with an ordinary path for a torch without it.

Nothing else in hullkit calls one. Checked on torch 2.11 (CUDA) and 2.13 (CPU).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.multiprocessing.reductions as torch_reductions
import torch.optim.optimizer as torch_optimizer
from torch import Tensor

_raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def raw_stream(device: torch.device) -> int:
    """The stream that copies and kernels of a CUDA device go to now, as its driver names it.

    torch's compiled code asks this way; the ordinary way makes an object every time.
    """
    if _raw_stream is None:
        return torch.cuda.current_stream(device).cuda_stream
    return _raw_stream(device.index)


def _always() -> bool:
    return True


# Whether torch's profiler is on. A torch that does not tell might be profiling: then yes.
profiler_enabled: Callable[[], bool] = getattr(torch._C._autograd, "_profiler_enabled", _always)


def _step_hooks() -> tuple[dict[int, Any], dict[int, Any]] | None:
    pre = getattr(torch_optimizer, "_global_optimizer_pre_hooks", None)
    post = getattr(torch_optimizer, "_global_optimizer_post_hooks", None)
    return None if pre is None or post is None else (pre, post)


# Hooks before and after the step of any optimizer, in dictionaries that torch changes in place;
# None if it has none.
step_hooks = _step_hooks()


def dlpack_exchange() -> Any:
    """The table of DLPack's C functions for tensors, in a capsule; None from a torch without."""
    return getattr(Tensor, "__dlpack_c_exchange_api__", None)


class StorageWatch(Protocol):
    """Tells whether a tensor's memory has been given back."""

    def expired(self) -> bool: ...


class _Unknown:
    def expired(self) -> bool:
        return True  # it may have been


def watch_storage(storage: torch.UntypedStorage) -> StorageWatch:
    """A weak reference to a tensor's memory; from a torch without, one that has always expired."""
    reference = getattr(torch_reductions, "StorageWeakRef", None)
    watch: StorageWatch = _Unknown() if reference is None else reference(storage)
    return watch


def _no_backward() -> int:
    return -1


# A number for the backward pass that runs now, -1 outside of one; always that from a torch without.
current_backward: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", _no_backward)


def _unknown_hooks(ignore_tracing: bool) -> None:
    return None


_saved_tensors_hooks: Callable[[bool], Any] = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", _unknown_hooks
)
pop_saved_tensors_hooks: Callable[[], None] = getattr(
    torch._C._autograd, "_pop_saved_tensors_default_hooks", lambda: None
)


def saved_tensors_hooks() -> Any:
    """The thread's innermost hooks of `torch.autograd.graph.saved_tensors_hooks`; None without any,
    and from a torch that does not tell."""
    return _saved_tensors_hooks(True)


def _never(tensor: Tensor) -> bool:
    return False


# Whether a tensor stands for others inside torch.vmap, torch.func.grad and the like.
is_transformed: Callable[[Tensor], bool] = getattr(
    getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor", _never
)


# One call for a list of tensors: on a CUDA device, a launch for many instead of one for each.


def foreach_copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """`target.copy_(source)` for each pair."""
    at_once = getattr(torch, "_foreach_copy_", None)
    if at_once is not None:
        at_once(targets, sources)
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def foreach_zero_(tensors: Sequence[Tensor]) -> None:
    """`tensor.zero_()` for each."""
    at_once = getattr(torch, "_foreach_zero_", None)
    if at_once is not None:
        at_once(tensors)
        return
    for tensor in tensors:
        tensor.zero_()


def foreach_norm(tensors: Sequence[Tensor], order: float) -> list[Tensor]:
    """`torch.linalg.vector_norm(tensor, order)` of each."""
    at_once = getattr(torch, "_foreach_norm", None)
    if at_once is not None:
        return list(at_once(tensors, order))
    return [torch.linalg.vector_norm(tensor, order) for tensor in tensors]
