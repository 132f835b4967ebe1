# SPDX-License-Identifier: Apache-2.0
"""Signals and errors at every moment of a call."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

SIGNALS = {
    signal.SIGINT: KeyboardInterrupt,
    signal.SIGALRM: TimeoutError,
    signal.SIGTERM: SystemExit,
}


@contextmanager
def raising(signum: int, error: type[BaseException]) -> Iterator[None]:
    def handler(*_: object) -> None:
        raise error("from the handler")

    previous = signal.signal(signum, handler)
    try:
        yield
    finally:
        signal.signal(signum, previous)


class AtEvery:
    """Runs a query again and again, each time with `act()` at a later moment: a line, call, return
    or error in `modules`, or at a bytecode of the functions named in `opcodes`."""

    def __init__(
        self,
        act: Callable[[], None],
        modules: tuple[ModuleType, ...],
        functions: tuple[str, ...] = (),
        opcodes: bool = False,
    ) -> None:
        self._act = act
        self._files = {module.__file__ for module in modules}
        self._functions = functions
        self._opcodes = opcodes
        self.where: set[str] = set()

    def run(self, query: Callable[[], None], check: Callable[[bool], None]) -> None:
        """check(whether it was the moment's turn)"""
        for self._chosen in range(1, 5000):
            self._seen = 0
            self._passed: dict[Any, int] = {}
            outer = sys.gettrace()
            sys.settrace(self._trace)
            try:
                query()
            finally:
                sys.settrace(outer)
            check(self._seen >= self._chosen)
            if self._seen < self._chosen:
                print(f"{self._chosen - 1} moments")
                return
        pytest.fail("not every moment was tried")

    def _trace(self, frame: Any, event: str, _: Any) -> Any:
        name = frame.f_code.co_name
        if frame.f_code.co_filename not in self._files:
            return None
        if self._functions and name not in self._functions:
            return None
        frame.f_trace_opcodes = self._opcodes
        moment = (name, frame.f_lineno, frame.f_lasti, event)
        self._passed[moment] = self._passed.get(moment, 0) + 1
        if self._passed[moment] > 2:  # a loop: its first two turns will do
            return self._trace
        self._seen += 1
        if self._seen == self._chosen:
            self.where.add(name)
            self._act()
        return self._trace
