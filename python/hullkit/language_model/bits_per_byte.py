"""Bits per byte of a text under a language model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_int
from .interface import (
    at_least_float32,
    check_labels,
    check_module,
    check_scorable,
    check_token_ids,
    device_of,
    forward_parameters,
    logits_of,
    token_limits,
    virtual_tokens,
)

# Elements of logits that are turned into float32 log-probabilities at a time (64 MiB).
_CHUNK_ELEMENTS = 1 << 24


def bits_per_byte(model: nn.Module, input_ids: Tensor, num_bytes: int) -> float:
    """Negative log-likelihood, in bits, of a sequence's scored tokens per byte of text they spell.

    `-sum_{t=1}^{T-1} log2 p(x_t | x_0 .. x_{t-1}) / num_bytes`. The first token has no prediction
    and is not scored, so its bytes do not belong to `num_bytes`; neither do bytes of text that was
    cut off before tokenisation ended.

    Equivalent to: `cross_entropy(logits[:-1], input_ids[1:], reduction="sum") / log(2) / num_bytes`

    Args:
        model: a causal language model: `model(ids)` with ids (1, T) returns logits (1, T, V), or an
            object with such `.logits` (Hugging Face). Run in eval mode (no dropout) without
            gradients, on its own device; every module's training flag is put back.
        input_ids: (T,) or (1, T) int64 token ids, T >= 2, on any device.
        num_bytes: UTF-8 bytes that the scored tokens `input_ids[1:]` spell, > 0.

    Returns:
        Bits per byte, a Python float. Log-softmax is taken in float32 (for float64 logits in
        float64), the sum over tokens in float64.

    Raises:
        TypeError: an argument of the wrong kind or dtype, or a model output without logits.
        ValueError: wrong rank, T < 2 or beyond a learned table of positions, ids outside the
            vocabulary, num_bytes < 1, or logits of another shape than (1, T, V).
        FloatingPointError: the negative log-likelihood is infinite or NaN.

    Complexity: one forward pass, plus O(T V) time and at most 64 MiB (or one token's row) for the
    log-softmax: it goes over the tokens in chunks. One synchronisation.

    Source: the score of HullFT, arXiv 2605.30337, whose code divides by the bytes of the whole text
    even where the text is cut.
    """
    check_module(model)
    check_scorable(model)
    check_int("num_bytes", num_bytes, 1)
    limits = token_limits(model)
    ids = check_token_ids("input_ids", input_ids, limits)
    check_labels("input_ids[1:], which are predicted", ids[:, 1:], limits)
    ids = ids.to(device_of(model, ids))
    cache = {"use_cache": False} if "use_cache" in forward_parameters(model) else {}
    with torch.no_grad(), eval_mode(model):
        # A learned prompt before the tokens has logits, too.
        output = logits_of(model(ids, **cache), ids, virtual_tokens(model))
        logits = output[0, -ids.shape[1] : -1]  # [T - 1, V]
        step = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
        chunks = zip(torch.split(logits, step), torch.split(ids[0, 1:], step), strict=True)
        nats = [F.cross_entropy(at_least_float32(x), y, reduction="none") for x, y in chunks]
    total = torch.cat(nats).cpu().double().sum().item() / math.log(2.0)
    if not math.isfinite(total):
        raise FloatingPointError(
            f"negative log-likelihood of input_ids: expected a finite number of bits, got {total}"
        )
    return total / num_bytes


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    try:
        # The flag itself, not .eval(): that may be overridden to do more (merge adapters).
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, training in flags:
            module.training = training
