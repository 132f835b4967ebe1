# SPDX-License-Identifier: Apache-2.0
"""Models that keep no keys and values while passes run, whatever the arguments of their forward.

A model whose forward has an argument `use_cache` is told so in each call (`without_cache`). Others
hand it on among their keyword arguments, or to nobody: then its configurations say so meanwhile. A
cache is more than wasted memory. Layers that run again in the backward pass would find it filled.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from torch import nn

from .interface import is_prompt_learning, without_cache


class CachesOff:
    """Configurations whose caches are off. `put_back` turns them on again."""

    def __init__(self) -> None:
        self._configs: list[Any] = []

    def take(self, model: nn.Module) -> None:
        # Learned prefixes are keys and values themselves.
        if without_cache(model) or any(map(is_prompt_learning, model.modules())):
            return
        found: Iterator[Any] = (module.__dict__.get("config") for module in model.modules())
        for config in {id(one): one for one in found}.values():
            with _lock:
                if getattr(config, "use_cache", None) is True or id(config) in _users:
                    self._configs.append(config)
                    _users.setdefault(id(config), set()).add(id(self))
                    with suppress(AttributeError):  # of one that is frozen
                        config.use_cache = False

    def put_back(self) -> None:
        """May be cut short, and called again."""
        while self._configs:
            config = self._configs[-1]
            with _lock:
                users = _users.get(id(config), set())
                users.discard(id(self))
                if not users:
                    with suppress(AttributeError):
                        config.use_cache = True
                    _users.pop(id(config), None)
            self._configs.pop()


_lock = threading.RLock()  # a signal may come inside, and its handler run a pass
# Whose caches are off, by configuration. Models of several threads may share one.
_users: dict[int, set[int]] = {}
