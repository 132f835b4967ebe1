# SPDX-License-Identifier: Apache-2.0
"""Gradients that functions leave for one another in a backward pass, and for nobody after it."""

from __future__ import annotations

from ..native.torch_private import current_backward


class OneBackward:
    """The backward pass that something was left in.

    A pass of a part of the graph, such as one that `torch.autograd.grad` makes inside a forward,
    may end before somebody takes what was left.
    """

    def __init__(self) -> None:
        self._number = current_backward()

    def is_another(self) -> bool:
        """Whether it is not the pass of the call before. What was left is to be forgotten then."""
        before, self._number = self._number, current_backward()
        return before != self._number
