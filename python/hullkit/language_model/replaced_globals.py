# SPDX-License-Identifier: Apache-2.0
"""Functions that a model's module looks up by name, replaced for one thread in a with-block."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Replacement(NamedTuple):
    """space[name] becomes stand_in(own, ...), where own is the function that was there."""

    space: dict[str, Any]
    name: str
    stand_in: Callable[..., Any]


class _Dispatch:
    """A function of a module, or its stand-in where the thread has one."""

    def __init__(self, own: Callable[..., Any]) -> None:
        self.own = own
        self.users = 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        stand_in = getattr(_here, "stand_ins", {}).get(self)
        if stand_in is None:
            return self.own(*args, **options)
        return stand_in(self.own, *args, **options)


_here = threading.local()
_lock = threading.RLock()  # a signal may come inside, and its handler run a pass


@contextmanager
def replaced_globals(replacements: list[Replacement]) -> Iterator[None]:
    """Inside the block this thread calls the stand-ins. Other threads' calls stay as they are.

    The names go back to the modules' own functions when no thread is inside a block.
    """
    before = getattr(_here, "stand_ins", {})
    stand_ins = dict(before)
    entered: list[tuple[Replacement, _Dispatch]] = []
    try:
        for replacement in replacements:
            space, name, stand_in = replacement
            with _lock:
                own = space[name]
                dispatch = own if isinstance(own, _Dispatch) else _Dispatch(own)
                entered.append((replacement, dispatch))
                dispatch.users += 1
                space[name] = dispatch
            stand_ins[dispatch] = stand_in
        _here.stand_ins = stand_ins
        yield
    finally:
        _here.stand_ins = before
        for replacement, dispatch in entered:
            with _lock:
                dispatch.users -= 1
                if dispatch.users <= 0 and replacement.space.get(replacement.name) is dispatch:
                    replacement.space[replacement.name] = dispatch.own
