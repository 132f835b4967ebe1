# SPDX-License-Identifier: Apache-2.0
"""How many slots fit into the memory, and how many of them fit into one pass."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import torch

from .._checks import check_int
from ..finetune.capture_memory import free_bytes

_MOST_SLOTS = 64  # that "auto" takes: more gain nothing
PLANNED = 512  # tokens of the texts that "auto" has in mind


def budget(memory: int | float | None, device: torch.device) -> int:
    """Bytes for slots and passes: so many, a part of those that are free, or all of these."""
    if memory is not None and not isinstance(memory, float):
        return int(check_int("memory", memory, 1))
    if memory is not None and not 0.0 < memory <= 1.0:
        raise ValueError(f"memory: expected bytes, or a fraction in (0, 1], got {memory}")
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free = free_bytes(device)
    elif "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        raise ValueError("memory: expected bytes, since this system does not tell what is free")
    return int(free * (1.0 if memory is None else memory))


def slots_within(num_bytes: int, of_slot: int) -> int:
    """The most slots, a power of 2 up to 64, for which there is memory; at least 1."""
    fitting = max(0, num_bytes) // of_slot
    return min(_MOST_SLOTS, 1 << max(0, fitting.bit_length() - 1))


class Room:
    """How many slots a pass takes at a time: all, or a half, a quarter, ... of them.

    limit: bytes that a pass may hold; None for as many as there are.
    held: the bytes that a pass of one text holds, by the text's length.
    """

    def __init__(self, slots: int, limit: int | None, held: Callable[[int], int]) -> None:
        self._slots = slots
        self._limit = limit
        self._held = held
        self._known: dict[int, float] = {}
        self._most_tokens = math.inf  # of a pass that has fitted so far

    def rows(self, length: int) -> int:
        """The slots of a pass whose texts have this length, at least 1."""
        rows = self._slots
        while rows > 1 and not self._fits(rows, length):
            rows = -(-rows // 2)
        return rows

    def check(self, length: int) -> None:
        """Raises MemoryError if not even one text of this length fits."""
        if self._limit is not None and self._of_text(length) > self._limit:
            raise MemoryError(
                f"examples: expected passes of at most {self._limit:.3g} bytes, the rest of "
                f"`memory`, got {self._of_text(length):.3g} or more for a text of {length} tokens"
            )

    def note_too_large(self, rows: int, length: int) -> None:
        """Notes that a pass was out of memory."""
        self._most_tokens = rows * length - 1

    def _fits(self, rows: int, length: int) -> bool:
        if rows * length > self._most_tokens:
            return False
        return self._limit is None or rows * self._of_text(length) <= self._limit

    def _of_text(self, length: int) -> float:
        """The bytes that a pass of one text of this length holds. What cannot fit is not tried."""
        if length not in self._known:
            assert self._limit is not None
            # Activations grow at least with the text. A half is for what does not.
            in_proportion = (held * length / own for own, held in self._known.items())
            least = max(in_proportion, default=0.0) / 2
            if least > self._limit:
                return least
            try:
                self._known[length] = self._held(length)
            except torch.OutOfMemoryError:
                self._known[length] = math.inf
        return self._known[length]
