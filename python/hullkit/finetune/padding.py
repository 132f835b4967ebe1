# SPDX-License-Identifier: Apache-2.0
"""Padding: sequences get one of a few lengths, for which captured passes are recorded."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..language_model.interface import IGNORED

Inputs = dict[str, Tensor]
# Lengths for every doubling. A text alone leaves much of a GPU idle, where fewer recordings count
# more than fewer tokens. 64 texts of 400 tokens of SmolLM2 take 2 to 3 % less time than with 416
# (H100), and those that share a pass are as long as the longest of them.
ALONE, TOGETHER = 8, 16
_TOLERANCE = 1e-4  # relative, between losses with and without a masked tail


class Padding:
    """Pads token ids and labels, unless the first padded example shows that the loss sees it.

    longest: the most tokens that a model's positions allow, 0 for no padding.
    loss_of: the loss of inputs; it may raise where the model takes no sequence of that length.
    """

    def __init__(self, longest: int, loss_of: Callable[[Inputs], float]) -> None:
        self._longest = longest
        self._loss_of = loss_of
        self._checked = False

    def __call__(self, inputs: Inputs) -> Inputs:
        own = inputs["input_ids"].shape[1]
        length = bucket(own, self._longest, ALONE)
        if length > own and not self._checked:
            if not self._is_unseen(inputs, length):
                self._longest, length = 0, own
            self._checked = True
        return padded(inputs, length)

    def _is_unseen(self, inputs: Inputs, length: int) -> bool:
        alone = self._loss_of(inputs)
        try:
            masked = self._loss_of(padded(inputs, length))
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return False
        return abs(alone - masked) <= _TOLERANCE * abs(alone)


def bucket(length: int, longest: int, lengths: int) -> int:
    """The length that a sequence of `length` tokens is padded to.

    Every doubling has `lengths` of them: they are 256 / lengths tokens apart up to 512, twice as
    far up to 1024, and so on. Nothing is padded beyond `longest`.
    """
    step = max(256, 1 << (length - 1).bit_length() - 1) // lengths
    return max(length, min(-(-length // step) * step, longest))


def padded(inputs: Inputs, length: int) -> Inputs:
    """Token ids and labels with a tail that is not scored. A causal model's loss stays the same."""
    tail = length - inputs["input_ids"].shape[1]
    if tail == 0:
        return inputs
    return {
        "input_ids": F.pad(inputs["input_ids"], (0, tail)),
        "labels": F.pad(inputs["labels"], (0, tail), value=IGNORED),
    }
