"""The score of a language model on a text, and how hullkit talks to a causal language model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import check_int
from ._limits import (
    check_labels,
    check_scorable,
    check_token_ids,
    token_limits,
    virtual_tokens,
)

__all__ = ["bits_per_byte"]

IGNORED = -100  # the label of a token that is not scored, as in F.cross_entropy

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


def check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def device_of(model: nn.Module, default: Tensor) -> torch.device:
    """Where the model takes its inputs. Offloaded weights are nowhere until their layer runs, and
    its hooks move what it is given."""
    here = (p.device for p in model.parameters() if not p.is_meta)
    return next(here, default.device)


def forward_parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The parameters of the model's forward, also behind torch.compile."""
    return inspect.signature(getattr(model, "_orig_mod", model).forward).parameters


def logits_of(output: Any, ids: Tensor, before: int = 0) -> Tensor:
    """The logits (1, T, V) in what a causal language model returned for ids (1, T); or
    (1, before + T, V), if it has put so many positions of its own before them."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            "model output: expected a tensor of logits or an object with .logits, "
            f"got {type(output).__name__}"
        )
    lengths = (ids.shape[1], ids.shape[1] + before)
    if logits.ndim != 3 or logits.shape[0] != 1 or logits.shape[1] not in lengths:
        expected = f"(1, {ids.shape[1]}, V)"
        raise ValueError(f"logits: expected shape {expected}, got {tuple(logits.shape)}")
    return logits


def at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


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
