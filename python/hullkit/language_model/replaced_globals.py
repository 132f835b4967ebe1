# SPDX-License-Identifier: Apache-2.0
"""Functions that a model's module looks up by name, replaced for one thread in a with-block."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
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
        self.users: set[int] = set()  # ids of open blocks

    def __call__(self, *args: Any, **options: Any) -> Any:
        blocks = open_blocks()
        stand_in = blocks[-1].stand_ins.get(self) if blocks else None
        if stand_in is None:
            return self.own(*args, **options)
        return stand_in(self.own, *args, **options)


class Block:
    """An open block of `replaced_globals`.

    stand_ins: of the blocks around it, too.
    """

    def __init__(self, around: Collection[Block]) -> None:
        self.stand_ins: dict[_Dispatch, Callable[..., Any]] = {}
        for block in around:
            self.stand_ins |= block.stand_ins
        self._entered: list[tuple[Replacement, _Dispatch]] = []

    def begin(self, replacements: list[Replacement]) -> None:
        made = {}
        for replacement in replacements:
            space, name, stand_in = replacement
            with _lock:
                own = space[name]
                dispatch = own if isinstance(own, _Dispatch) else _Dispatch(own)
                self._entered.append((replacement, dispatch))
                dispatch.users.add(id(self))
                space[name] = dispatch
            made[dispatch] = stand_in
        self.stand_ins |= made

    def end(self) -> None:
        """May be cut short, and called again."""
        for replacement, dispatch in self._entered:
            with _lock:
                dispatch.users.discard(id(self))
                if not dispatch.users and replacement.space.get(replacement.name) is dispatch:
                    replacement.space[replacement.name] = dispatch.own


_here = threading.local()  # its blocks, the innermost last
_lock = threading.RLock()  # a signal may come inside, and its handler run a pass


@contextmanager
def replaced_globals(replacements: list[Replacement]) -> Iterator[None]:
    """Inside the block this thread calls the stand-ins. Other threads' calls stay as they are.

    The names go back to the modules' own functions when no thread is inside a block.
    """
    around = open_blocks()
    block = Block(around)
    try:
        _here.blocks = (*around, block)
        block.begin(replacements)
        yield
    finally:
        end_blocks(but=around)


def open_blocks() -> tuple[Block, ...]:
    """This thread's blocks."""
    blocks: tuple[Block, ...] = getattr(_here, "blocks", ())
    return blocks


def end_blocks(but: tuple[Block, ...]) -> None:
    """Ends this thread's other blocks, also those that a signal has kept from ending themselves."""
    blocks = open_blocks()
    for block in blocks:
        if block not in but:
            block.end()
    _here.blocks = tuple(block for block in blocks if block in but)
