# SPDX-License-Identifier: Apache-2.0
"""The precision of products: torch's settings for float32, through both interfaces; autocast.

torch has one setting for all threads. The first block of `matmul_precision` keeps what was set, and
the last one of all threads puts it back. Blocks of one precision may be open together. A thread
that asks for the other one waits until theirs have ended: its numbers would be theirs, and an error
would hit queries that are right, at moments that nobody can foresee.
"""

from __future__ import annotations

import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class ProductSettings(NamedTuple):
    """The settings at one moment.

    common: of `torch.set_float32_matmul_precision`. None where torch does not tell it, since the
        newer settings of single backends contradict it.
    single: of the backends, "none" where nothing is set. Empty before torch has such settings.
    """

    common: str | None
    single: tuple[str, ...]

    @classmethod
    def now(cls) -> ProductSettings:
        single = tuple(backend.fp32_precision for backend in _backends())
        try:
            return cls(torch.get_float32_matmul_precision(), single)
        except RuntimeError:
            return cls(None, single)

    def put_back(self) -> None:
        # What is as before is not written: a value of its own would hide a later, wider setting.
        if ProductSettings.now() == self:
            return
        if self.common is not None:
            torch.set_float32_matmul_precision(self.common)
        for backend, value in zip(_backends(), self.single, strict=True):
            backend.fp32_precision = "none"  # torch's wider settings may give the value already
            if backend.fp32_precision != value:
                backend.fp32_precision = value


class Block:
    """An open block of `matmul_precision`."""

    def __init__(self, precision: str) -> None:
        self.rounds = precision == "tf32"
        self.thread = threading.get_ident()


PATIENCE = 60.0  # seconds after which a thread says that it waits
_AT_A_TIME = 0.05  # seconds of a wait: Python hears a signal that comes as one begins at its end
_lock = threading.RLock()  # a signal may come inside, and its handler run a pass
_changed = threading.Condition(_lock)
_blocks: dict[int, list[Block]] = {}  # of each thread, the innermost last
_running: dict[int, bool] = {}  # whether products of a thread's passes are rounded, as they are now
_waiting: dict[int, None] = {}  # threads in the order in which they came
_before: ProductSettings | None = None  # what was set when nothing was running


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Inside the block float32 products are TensorFloat-32 for "tf32", else full float32.

    It begins when no other thread is in a block of the other precision. A block within another of
    the thread's own takes its place meanwhile.
    """
    block = Block(precision)
    try:
        with _lock:
            _blocks.setdefault(block.thread, []).append(block)
            _follow(block.thread)
        yield
    finally:
        with _lock:
            if block in _blocks.get(block.thread, ()):
                _blocks[block.thread].remove(block)
            _follow(block.thread)


def open_blocks() -> list[Block]:
    """This thread's blocks."""
    return [*_blocks.get(threading.get_ident(), ())]


def end_blocks(but: Collection[Block]) -> None:
    """Ends this thread's other blocks, which a signal has kept from ending themselves."""
    thread = threading.get_ident()
    with _lock:
        if thread in _blocks:
            _blocks[thread] = [block for block in _blocks[thread] if block in but]
        _follow(thread)


def _follow(thread: int) -> None:
    """Gives a thread the precision of its innermost block. It may be cut short and called again.

    A thread that waits has no precision. So two threads that wait do not wait for each other.
    """
    global _before
    _waiting.pop(thread, None)  # a signal may have kept it there
    own = _blocks.get(thread)
    if own and _running.get(thread) is own[-1].rounds:
        return
    _running.pop(thread, None)
    if not _running and _before is not None:
        _before.put_back()
        _before = None
    _changed.notify_all()
    if not own:
        _blocks.pop(thread, None)
        return
    wanted = own[-1].rounds
    _waiting[thread] = None

    def may_begin() -> bool:
        if thread not in _waiting:  # a signal's handler had blocks of its own, and followed then
            return thread in _running
        # In the order of arrival: a stream of one precision must not keep the other out.
        return next(iter(_waiting)) == thread and set(_running.values()) <= {wanted}

    try:
        if not _wait_for(may_begin, PATIENCE):
            warnings.warn(
                f"this thread needs products in {_name(wanted)} and has waited {PATIENCE:g} "
                f"seconds for another one, whose passes need {_name(not wanted)}: torch has one "
                "precision of products for all threads. If that one waits for this one, neither "
                "will end",
                RuntimeWarning,
                stacklevel=5,  # the caller of the block
            )
            _wait_for(may_begin, math.inf)
    finally:
        _waiting.pop(thread, None)
        _changed.notify_all()
    if not _running:
        _before = ProductSettings.now()
        _set(_before, wanted)
    _running[thread] = wanted


def _wait_for(may_begin: Callable[[], bool], seconds: float) -> bool:
    """Whether the time to begin has come within so many seconds."""
    end = time.monotonic() + seconds
    while not may_begin():
        if time.monotonic() >= end:
            return False
        _changed.wait(_AT_A_TIME)
    return True


def _name(rounds: bool) -> str:
    return "TensorFloat-32" if rounds else "full float32"


def _set(before: ProductSettings, rounds: bool) -> None:
    common, single = ("high", "tf32") if rounds else ("highest", "ieee")
    # A common "high" does not say that CUDA's products are; "highest" says that none are rounded.
    cuda = before.single[:1]
    if before.common == common and (single == "ieee" or cuda in ((), ("tf32",))):
        return
    if before.common is not None:
        torch.set_float32_matmul_precision(common)
    else:
        for backend in _backends():
            backend.fp32_precision = single


def _forget_other_threads() -> None:
    """In the child of a fork, which has only the thread that forked."""
    global _lock, _changed
    _lock = threading.RLock()
    _changed = threading.Condition(_lock)
    thread = threading.get_ident()
    for kept in (_blocks, _running, _waiting):
        for other in kept.keys() - {thread}:
            del kept[other]
    end_blocks(open_blocks())


os.register_at_fork(after_in_child=_forget_other_threads)


def autocast_of_pass(device_type: str, enabled: bool) -> torch.autocast:
    """Autocast to bfloat16 for one pass, or none. Weights are cast anew in it.

    torch keeps what it has cast until the outermost autocast ends, also when weights have changed
    by then. The caller, or the model's own forward, may have begun another one.
    """
    torch.clear_autocast_cache()
    return torch.autocast(device_type, torch.bfloat16, enabled=enabled)


def _backends() -> tuple[Any, ...]:
    """CUDA's products, then the CPU's; torch has had settings of each since 2.9."""
    cuda: Any = torch.backends.cuda.matmul
    cpu: Any = torch.backends.mkldnn
    return (cuda, cpu.matmul) if hasattr(cuda, "fp32_precision") else ()
