# SPDX-License-Identifier: Apache-2.0
"""Which passes keep their activations, and which compute them again."""

from __future__ import annotations

import math

from .padding import Inputs

CHOICES = ("auto", "keep", "recompute")


class ActivationsTooLarge(Exception):
    """A pass holds more than the memory that it may have."""


class ActivationPlan:
    """Whether passes keep activations: by the user's choice, or by what has fitted so far.

    "auto" keeps them until a pass of some length does not fit. That pass and longer ones then hold
    one input for each layer, and run layers again in the backward half.
    """

    def __init__(self, choice: str) -> None:
        self._automatic = choice == "auto"
        self._longest = -1 if choice == "recompute" else math.inf  # tokens of passes that keep all

    def recomputes(self, inputs: Inputs) -> bool:
        return inputs["input_ids"].numel() > self._longest

    def may_recompute(self, inputs: Inputs) -> bool:
        """Whether these inputs keep all so far, and may do with less."""
        return self._automatic and not self.recomputes(inputs)

    def note_too_large(self, inputs: Inputs) -> None:
        """Notes that activations of these inputs do not fit."""
        self._longest = inputs["input_ids"].numel() - 1
