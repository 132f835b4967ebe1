# SPDX-License-Identifier: Apache-2.0
"""Whether a model's rows can share a pass: they must change neither each other nor feel padding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_TOKENS = 64  # of the text that is tried
# Bounds of the `difference` of logits that should be the same. Whatever mixes rows or looks ahead
# moves them by a part of their size that does not depend on the dtype. No bound is derived from a
# model. Inputs of two shapes may run through other kernels, whose rounding differs. Inputs of one
# shape do so in experts alone, which get other tokens.
_BOUND, _BOUND_OF_HALVES, _OF_ONE_SHAPE = 1e-3, 0.1, 1e-2

Logits = Callable[[Tensor], Tensor]  # of ids (R, T): (R, T, V), the model's own
# The same, where row i goes through the first slot + i of two with large factors.
SlotLogits = Callable[[Tensor, int], Tensor]
# A step of `generate` by its cache, after ids (R, T) and one token more in each row: its logits
# (R, V) and these tokens (R,), which may be given. The slots are as above.
SlotSteps = Callable[[Tensor, int, Tensor | None], tuple[Tensor, Tensor]]


class Neighbours:
    """What the first text shows of the model.

    logits: the model's own. of_slots: with factors. steps: of `generate`, with factors. dtype: of
    products. slots: of a batch. apart: whether every text has a pass of its own, in full float32.
    graphs: whether passes are recorded, for padded lengths. knows_longest: whether the model tells
    which lengths it takes.
    """

    def __init__(
        self,
        logits: Logits,
        of_slots: SlotLogits,
        steps: SlotSteps,
        dtype: torch.dtype,
        slots: int,
        apart: bool,
        graphs: bool,
        knows_longest: bool,
    ) -> None:
        self._logits, self._of_slots, self._steps, self._dtype = logits, of_slots, steps, dtype
        self._apart = apart
        self._bound = _BOUND if apart else _BOUND_OF_HALVES
        self._of_one_shape = _BOUND if apart else _OF_ONE_SHAPE
        self._taken: dict[int, bool] | None = None if knows_longest else {}
        self._checked = slots == 1
        self._moved_in_steps = 0.0 if slots == 1 else None  # None: not known yet
        # A text that is apart needs padding for a graph only. None: not known yet.
        self._pads: bool | None = False if apart and not graphs else None

    def pads(self, text: Tensor) -> bool:
        """Whether texts are padded.

        Raises ValueError if rows of a batch change each other, where texts share passes.
        """
        if not self._apart:
            self.check_rows(text)
        if self._pads is None:
            self._pads = not self._feels_padding(text)
        return self._pads

    def takes(self, length: int) -> bool:
        """Whether the model takes texts that are padded to this length.

        Of one that does not tell, each length is tried: a parameter may hold its positions.
        """
        if self._taken is None:
            return True
        if length not in self._taken:
            try:
                self._logits(torch.zeros(1, length, dtype=torch.int64, device="cpu"))
                self._taken[length] = True
            except torch.OutOfMemoryError:
                raise
            except Exception:
                self._taken[length] = False
        return self._taken[length]

    def check_rows(self, text: Tensor) -> None:
        """Raises ValueError if another row of a batch changes what the model says of a text.

        The model may mix rows, or lay them out so that a layer's rows are not its slots': tokens
        first, say, or sorted.
        """
        if self._checked:
            return
        text = text[:_TOKENS]
        both = torch.stack([text, _others(text)[0]])
        beside = self._of_slots(both, 0)
        alone = (self._of_slots(both[k : k + 1], k)[0] for k in range(2))
        moved = max(difference(*pair, self._dtype) for pair in zip(alone, beside, strict=True))
        if moved > self._bound:
            raise ValueError(
                "model: expected rows of a batch that do not change each other, one after the "
                "other in all layers, got logits that differ by "
                f"{moved:.1e} beside another row"
            )
        self._checked = True

    def steps_mix_rows(self, text: Tensor) -> bool:
        """Whether another row of a batch changes a step of `generate` after a text (T,), T >= 1.

        Its cache may mix rows where a forward pass does not, as in RWKV of transformers.
        """
        if self._moved_in_steps is None:
            text = text[:_TOKENS]
            both = torch.stack([text, _others(text)[0]])
            alone = [self._steps(both[k : k + 1], k, None) for k in range(2)]
            beside, _ = self._steps(both, 0, torch.cat([tokens for _, tokens in alone]))
            pairs = zip(torch.cat([logits for logits, _ in alone]), beside, strict=True)
            self._moved_in_steps = max(difference(*pair, self._dtype) for pair in pairs)
        return self._moved_in_steps > self._bound  # numbers that are not finite tell nothing

    def check_steps(self, text: Tensor) -> None:
        """Raises ValueError for such a model."""
        if self.steps_mix_rows(text):
            raise ValueError(
                "model: expected rows of a batch that do not change each other in a step of "
                f"generate, got logits that differ by {self._moved_in_steps:.1e} beside another "
                "row; use_cache=False generates without a cache"
            )

    def _feels_padding(self, text: Tensor) -> bool:
        """Whether a tail of other tokens changes what the model says of the tokens before it.

        It does in a model that is not causal. A model that takes no longer text counts as one.
        """
        own = text[: max(2, min(_TOKENS, len(text)) // 2)]
        alone = self._logits(own[None])[0]
        try:
            padded = [
                self._logits(torch.cat([own, tail])[None])[0, : len(own)] for tail in _others(own)
            ]
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return True
        moved = difference(alone, padded[0], self._dtype)
        by_tails = difference(padded[0], padded[1], self._dtype)
        return moved > self._bound or by_tails > self._of_one_shape


def _others(text: Tensor) -> tuple[Tensor, Tensor]:
    """As many tokens twice, each another one: among equal ones nothing would show."""
    first = torch.where(text == 0, 1, 0)
    return first, 1 - first


def difference(logits: Tensor, other: Tensor, dtype: torch.dtype) -> float:
    """How far logits (..., V) are from others, relative to the size of all together.

    Each token's mean is taken off first, since no loss or choice depends on it. Rounding of the
    logits to `dtype`, which an offset makes large, counts as no difference.
    """
    rounding = torch.finfo(dtype).eps * logits.double().norm()
    logits, other = (t.double() - t.double().mean(-1, keepdim=True) for t in (logits, other))
    moved = (logits - other).norm()
    moved = (moved - rounding).clamp_min(0) if moved.isfinite() else moved
    return float(moved / logits.norm().clamp_min(1e-30))
