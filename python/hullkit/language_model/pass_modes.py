# SPDX-License-Identifier: Apache-2.0
"""Modes of torch's functions that end with their blocks."""

from __future__ import annotations

from typing import Any

from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)


class PassMode(TorchFunctionMode):
    """A mode for one block, whatever a signal handler raises at whatever moment.

    torch takes a mode off its stack while it handles a function, and puts it back. An error that is
    raised between the two keeps it off, or puts it back when somebody lets go of the error: after
    the block. So a mode that has ended handles nothing, and the next one takes it off.
    """

    def __init__(self) -> None:
        super().__init__()
        self._running = False

    def __enter__(self) -> PassMode:
        while _has_ended(_top()):
            _pop_mode()
        self._running = True
        _push_mode(self)
        return self

    def __exit__(self, *error: object) -> None:
        self._running = False
        if _top() is self:
            _pop_mode()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self.handle(func, args, kwargs) if self._running else func(*args, **kwargs)

    def handle(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What a call of a function of torch becomes inside the block."""
        raise NotImplementedError


def modes() -> list[Any]:
    """torch's stack of modes, anybody's, without those that have ended."""
    return [mode for mode in _get_current_function_mode_stack() if not _has_ended(mode)]


def put_back(before: list[Any]) -> None:
    """Makes torch's stack what it was. Modes that it did not have then end."""
    left = _get_current_function_mode_stack()
    if [*map(id, left)] == [*map(id, before)]:
        return
    for mode in left:
        if isinstance(mode, PassMode) and not any(mode is one for one in before):
            mode._running = False
    for _ in left:
        _pop_mode()
    for mode in before:
        _push_mode(mode)


def _has_ended(mode: Any) -> bool:
    return isinstance(mode, PassMode) and not mode._running


def _top() -> Any:
    stack = _get_current_function_mode_stack()
    return stack[-1] if stack else None
