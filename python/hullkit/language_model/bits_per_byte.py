# SPDX-License-Identifier: Apache-2.0
"""Bits per byte of a text under a language model."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_int
from .eval_mode import EvalMode
from .interface import (
    at_least_float32,
    check_module,
    check_predicted,
    check_scorable,
    check_token_ids,
    device_of,
    logits_of,
    token_limits,
    virtual_tokens,
    without_cache,
)

# So many logits at a time become float32 log-probabilities: 64 MiB.
_CHUNK_ELEMENTS = 1 << 24


def bits_per_byte(model: nn.Module, input_ids: Tensor, num_bytes: int) -> float:
    """Negative log-likelihood of a text in bits, per byte of the text.

    `-sum_{t=1}^{T-1} log2 p(x_t | x_0 .. x_{t-1}) / num_bytes`. The first token has no prediction
    and is not scored: do not count its bytes. Do not count bytes of text that was cut off either.

    Equivalent to: `cross_entropy(logits[:-1], input_ids[1:], reduction="sum") / log(2) / num_bytes`

    Args:
        model: a causal language model: `model(ids)` with ids (1, T) returns logits (1, T, V), or an
            object with such `.logits` (transformers). It runs on its own device, in eval mode and
            without gradients. Every module's training flag is as before afterwards. Nothing checks
            that it is causal: the bits of one that sees later tokens say nothing.
        input_ids: (T,) or (1, T) int64 token ids, T >= 2, on any device.
        num_bytes: UTF-8 bytes that the scored tokens `input_ids[1:]` spell, > 0.

    Returns:
        Bits per byte, a Python float.

    Raises:
        TypeError: an argument of the wrong kind or dtype, or a model output without logits.
        ValueError: wrong rank, T < 2 or beyond a learned table of positions, ids outside the
            vocabulary or without a logit, num_bytes < 1, logits of another shape than (1, T, V), or
            an encoder-decoder.
        FloatingPointError: the negative log-likelihood is infinite or NaN.

    >>> import hullkit, torch
    >>> uniform = torch.nn.Embedding(4, 4, _weight=torch.zeros(4, 4))  # 4 tokens, equally likely
    >>> round(hullkit.bits_per_byte(uniform, torch.tensor([0, 1, 2]), num_bytes=2), 6)
    2.0

    Numerics: log-softmax in float32, or float64 for float64 logits; the sum over tokens in float64.
    Cost: one forward pass, O(T V) time and at most 64 MiB, or one token's row, for the log-softmax.
    With ids on the host it waits for the device once.

    Source: the score of HullFT, arXiv 2605.30337, whose code divides by the bytes of the whole text
    even where the text is cut.
    """
    check_module(model)
    check_scorable(model)
    check_int("num_bytes", num_bytes, 1)
    limits = token_limits(model)
    ids = check_token_ids("input_ids", input_ids, limits)
    check_predicted("input_ids[1:], which are predicted", ids, limits)
    given, ids = ids, ids.to(device_of(model, ids))
    with EvalMode(model):
        # PEFT puts learned positions before the tokens, and they have logits too.
        output = logits_of(model(ids, **without_cache(model)), ids, virtual_tokens(model))
        logits = output[0, -ids.shape[1] : -1]  # [T - 1, V]
        limits = limits._replace(labels=logits.shape[1])  # which not every model tells
        check_predicted("input_ids[1:], which are predicted", given, limits)
        step = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
        chunks = zip(torch.split(logits, step), torch.split(ids[0, 1:], step), strict=True)
        nats = [F.cross_entropy(at_least_float32(x), y, reduction="none") for x, y in chunks]
    total = torch.cat(nats).cpu().double().sum().item() / math.log(2.0)
    if not math.isfinite(total):
        raise FloatingPointError(
            f"negative log-likelihood of input_ids: expected a finite number of bits, got {total}"
        )
    return total / num_bytes
