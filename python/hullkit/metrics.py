"""The score of a language model on a text, and how hullkit talks to a causal language model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import check_int, check_tensor

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
    check_int("num_bytes", num_bytes, 1)
    ids = check_token_ids("input_ids", input_ids, token_limits(model))
    ids = ids.to(device_of(model, ids))
    cache = {"use_cache": False} if "use_cache" in forward_parameters(model) else {}
    with torch.no_grad(), eval_mode(model):
        logits = logits_of(model(ids, **cache), ids)[0, :-1]  # [T - 1, V]
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


class TokenLimits(NamedTuple):
    """What a sequence must keep to: on a GPU an index outside an embedding ends the process."""

    vocabulary: int | None  # token ids; None where that cannot be told, here and below
    positions: int | None  # rows of a learned table of positions


def token_limits(model: nn.Module) -> TokenLimits:
    return TokenLimits(vocabulary_size(model), _learned_positions(model))


def check_token_ids(name: str, ids: Any, limits: TokenLimits) -> Tensor:
    """`ids` as (1, T), after checking type, dtype, rank, T and the range of the ids."""
    tokens = check_tensor(name, ids)
    if tokens.dtype != torch.int64:
        raise TypeError(f"{name}: expected dtype torch.int64, got {tokens.dtype}")
    if tokens.ndim not in (1, 2) or (tokens.ndim == 2 and tokens.shape[0] != 1):
        raise ValueError(f"{name}: expected shape (T,) or (1, T), got {tuple(tokens.shape)}")
    if tokens.shape[-1] < 2:
        raise ValueError(f"{name}: expected at least 2 tokens, got {tokens.shape[-1]}")
    vocabulary, positions = limits
    if positions is not None and tokens.shape[-1] > positions:
        raise ValueError(
            f"{name}: expected at most {positions} tokens, the model's positions, "
            f"got {tokens.shape[-1]}"
        )
    low, high = (int(x) for x in torch.aminmax(tokens))
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        wanted = "ids >= 0" if vocabulary is None else f"ids in [0, {vocabulary})"
        raise ValueError(f"{name}: expected {wanted}, got {low if low < 0 else high}")
    return tokens.reshape(1, -1)


def vocabulary_size(model: nn.Module) -> int | None:
    """The number of token ids `model` has rows for, or None where that cannot be told."""
    known = getattr(_input_embeddings(model), "num_embeddings", None)
    if isinstance(known, int):
        return known
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if isinstance(size, int):
        return size
    # A plain model: its positions may be an embedding too, so only the largest one bounds the ids.
    rows = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    return max(rows, default=None)


def _learned_positions(model: nn.Module) -> int | None:
    """Of an embedding, other than the tokens', with as many rows as the configuration has
    positions. Computed ones (rotary) have none."""
    configured = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    tokens = _input_embeddings(model)
    if tokens is None or not isinstance(configured, int):
        return None
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens)
    return configured if any(m.num_embeddings == configured for m in tables) else None


def _input_embeddings(model: nn.Module) -> Any:
    find = getattr(model, "get_input_embeddings", None)
    try:
        return find() if callable(find) else None
    except NotImplementedError:
        return None


def device_of(model: nn.Module, default: Tensor) -> torch.device:
    first = next(model.parameters(), None)
    return default.device if first is None else first.device


def forward_parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The parameters of the model's forward, also behind torch.compile."""
    return inspect.signature(getattr(model, "_orig_mod", model).forward).parameters


def logits_of(output: Any, ids: Tensor) -> Tensor:
    """The logits (1, T, V) in what a causal language model returned for ids (1, T)."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(
            "model output: expected a tensor of logits or an object with .logits, "
            f"got {type(output).__name__}"
        )
    if logits.ndim != 3 or logits.shape[:2] != ids.shape:
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
