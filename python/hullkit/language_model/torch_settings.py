# SPDX-License-Identifier: Apache-2.0
"""torch's settings that blocks set and put back, for those whose end was cut short."""

from __future__ import annotations

import torch

from ..native.torch_private import pop_saved_tensors_hooks, saved_tensors_hooks
from . import pass_modes, product_settings, replaced_globals


class TorchSettings:
    """torch's settings at this moment, and the thread's blocks of products and of functions.

    A context manager whose `__exit__` is cut short leaves its setting behind.
    """

    def __init__(self) -> None:
        self._grad = torch.is_grad_enabled()
        self._products = product_settings.open_blocks()
        self._functions = replaced_globals.open_blocks()
        self._autocast = [
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
        ]
        self._cached = torch.is_autocast_cache_enabled()
        self._depth = autocast_depth()
        self._modes = pass_modes.modes()
        self._hooks = saved_tensors_hooks()

    def put_back(self) -> None:
        """May be cut short, and called again."""
        pass_modes.put_back(self._modes)
        torch.set_grad_enabled(self._grad)
        product_settings.end_blocks(but=self._products)
        replaced_globals.end_blocks(but=self._functions)
        for device, enabled, dtype in self._autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(self._cached)
        while autocast_depth() > self._depth:
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()
        while autocast_depth() < 0:  # a block that was entered before this one has ended before it
            torch.autocast_increment_nesting()
        while saved_tensors_hooks() not in (None, self._hooks):
            pop_saved_tensors_hooks()


def autocast_depth() -> int:
    """How many blocks of autocast are open. A signal comes before both calls or after them."""
    more, fewer = torch.autocast_increment_nesting, torch.autocast_decrement_nesting
    _, depth = next(zip(iter(more, None), iter(fewer, None)))  # noqa: B905 both go on for ever
    return depth
