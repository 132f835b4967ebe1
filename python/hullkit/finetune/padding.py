"""Padding: sequences get one of a few lengths, for which captured passes are recorded."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..language_model.interface import IGNORED

Inputs = dict[str, Tensor]


def bucket(length: int, longest: int) -> int:
    """The length that a sequence of `length` tokens is padded to.

    It is a multiple of 32 up to 512, of 64 up to 1024, and so on: 8 lengths for every doubling. A
    length beyond 256 grows by at most 1/8. Nothing is padded beyond `longest`.
    """
    step = max(32, 1 << max(0, (length - 1).bit_length() - 4))
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
