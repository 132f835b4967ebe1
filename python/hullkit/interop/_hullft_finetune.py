# SPDX-License-Identifier: Apache-2.0
"""The finetuning functions of HullFT-shaped code, see hullkit.interop.hullft."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .._checks import check_choice
from .._tensors import HALVES
from ..finetune import TestTimeFinetuner
from ..language_model.interface import IGNORED, without_cache
from ..language_model.pass_copies import PassCopies, narrowed_tensors
from ..optim import Adam
from ._arguments import integer

METHODS = ("standard", "gradient_refresh", "sift_global_refresh", "sift_consecutive_refresh")


def finetune_with_approach(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    approach_config: Mapping[str, Any] | None,
    batch_size: int = 1,
    max_length: int = 1024,
    lr: float = 5e-5,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Finetune a Hugging Face model in place, one Adam update (betas .9, .999) for each text.

    The method "standard" makes a pass and an update for every batch_size texts. "gradient_refresh"
    and "sift_global_refresh" group equal texts, in the order first seen; "sift_consecutive_refresh"
    groups runs of equal texts. A group makes a pass every refresh_interval updates, see
    :func:`hullkit.reuse_schedule`.

    The model is left adapted and in eval mode: restoring it is the caller's part, as in the
    published code. On a CUDA device passes are captured, see :class:`hullkit.TestTimeFinetuner`.
    The recorded passes are kept for the next call with this model, until another one comes or
    :func:`release` is called.

    Args:
        model: a causal language model; one whose output has a `loss` where a batch has several
            texts.
        tokenizer: called with a list of texts and transformers' options (`truncation`,
            `max_length`, `padding`, `return_tensors`); a mapping of `input_ids` and
            `attention_mask`.
        texts: the texts to train on, repeats included.
        approach_config: "method" (default "standard") and "refresh_interval" (default 2); None for
            the defaults.
        batch_size: texts of a pass of "standard", >= 1.
        max_length: tokens that a text is cut to, >= 2.
        lr: the learning rate.
        device: where the model is moved; None for CUDA if there is any, else the CPU.
    Returns:
        A dict of finetune_steps (updates), finetune_seconds (device work included),
        finetune_approach, finetune_unique_texts (groups) and finetune_total_texts.
    Raises:
        TypeError, ValueError: texts is one str; another method; a batch_size below 1, a max_length
            below 2; a text of less than two tokens; a batch of texts of several lengths without a
            pad token.

    >>> import torch
    >>> from hullkit.interop.hullft import finetune_with_approach
    >>> def tokenizer(texts, **options):  # a token is a byte
    ...     ids = torch.tensor([list(text.encode()) for text in texts])
    ...     return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    >>> model = torch.nn.Sequential(torch.nn.Embedding(128, 4), torch.nn.Linear(4, 128))
    >>> config = {"method": "gradient_refresh"}
    >>> report = finetune_with_approach(model, tokenizer, ["ab", "cd", "ab"], config, device="cpu")
    >>> report["finetune_steps"], report["finetune_unique_texts"]
    (3, 2)
    """
    if isinstance(texts, str):
        raise TypeError("texts: expected a sequence of texts, got a str")
    config = approach_config or {}
    method = config.get("method", "standard")
    check_choice("approach_config['method']", method, METHODS)
    interval = max(1, int(config.get("refresh_interval", 2)))
    batch_size = integer("batch_size", batch_size, 1)
    max_length = integer("max_length", max_length, 2)
    groups: list[tuple[list[str], int]]  # texts of a batch, updates to make with it
    if method == "standard":
        starts = range(0, len(texts), batch_size)
        groups = [(list(texts[i : i + batch_size]), 1) for i in starts]
        unique = len(set(texts))
    else:
        runs = method == "sift_consecutive_refresh"
        counted = (
            [(text, len(list(run))) for text, run in itertools.groupby(texts)]
            if runs
            else Counter(texts).items()
        )
        groups = [([text], count) for text, count in counted]
        unique = len(groups)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model.to(device).eval()
    start = time.perf_counter()
    _finetune_in_place(model, tokenizer, groups, interval, max_length, float(lr), device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {
        "finetune_steps": sum(count for _, count in groups),
        "finetune_seconds": time.perf_counter() - start,
        "finetune_approach": method,
        "finetune_unique_texts": unique,
        "finetune_total_texts": len(texts),
    }


def finetune_on_texts(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    batch_size: int = 1,
    max_length: int = 1024,
    lr: float = 5e-5,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """The method "standard" of :func:`finetune_with_approach`.

    Args:
        model, tokenizer, texts, batch_size, max_length, lr, device: as there.
    Returns:
        A dict of finetune_steps and finetune_seconds.
    Raises:
        TypeError, ValueError: as there.

    >>> import torch
    >>> from hullkit.interop.hullft import finetune_on_texts
    >>> def tokenizer(texts, **options):  # a token is a byte
    ...     ids = torch.tensor([list(text.encode()) for text in texts])
    ...     return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    >>> model = torch.nn.Sequential(torch.nn.Embedding(128, 4), torch.nn.Linear(4, 128))
    >>> finetune_on_texts(model, tokenizer, ["ab", "cd"], device="cpu")["finetune_steps"]
    2
    """
    report = finetune_with_approach(
        model, tokenizer, texts, None, batch_size, max_length, lr, device
    )
    return {key: report[key] for key in ("finetune_steps", "finetune_seconds")}


def _finetune_in_place(
    model: Any,
    tokenizer: Any,
    groups: list[tuple[list[str], int]],
    interval: int,
    max_length: int,
    lr: float,
    device: torch.device,
) -> None:
    # Checked before any weight is touched.
    batches = [_tokens(tokenizer, texts, max_length) for texts, _ in groups]
    for (texts, _), batch in zip(groups, batches, strict=True):
        for text, mask in zip(texts, batch["attention_mask"], strict=True):
            if mask.sum() < 2:
                raise ValueError(f"texts: expected at least 2 tokens each, got {text!r}")
    model.zero_grad()
    if not groups:
        return
    if all(len(texts) == 1 for texts, _ in groups):
        examples = [batch["input_ids"] for batch in batches]
        _tuner_of(model, lr, interval).adapt_(examples, [count for _, count in groups])
        return
    # Batches of several texts, which a tuner does not take; each makes one update. Halves are
    # treated as there.
    options = without_cache(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    halves = any(p.dtype in HALVES for p in parameters)
    optimizer = Adam(parameters, lr=lr, stochastic_rounding=halves)
    copies = PassCopies(narrowed_tensors(model))
    for batch in batches:
        inputs = {key: tensor.to(device) for key, tensor in batch.items()}
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORED)
        copies.refresh()
        with copies.in_place():
            try:
                model(**inputs, labels=labels, **options).loss.backward()
                gradients = {p: p.grad for p in parameters if p.grad is not None}
            finally:
                model.zero_grad()
        optimizer.step_with(gradients)


def _tokens(tokenizer: Any, texts: list[str], max_length: int) -> Any:
    """Texts of one length are not padded, which would need a pad token; others to the longest."""
    options: dict[str, Any] = {"truncation": True, "max_length": max_length}
    lengths = set(map(len, tokenizer(texts, **options)["input_ids"])) if len(texts) > 1 else {0}
    padding = len(lengths) > 1
    if padding and getattr(tokenizer, "pad_token", "") is None:
        raise ValueError(
            "tokenizer: expected a pad_token for a batch of texts of different lengths, got None. "
            "Set tokenizer.pad_token, or batch_size=1"
        )
    return tokenizer(texts, padding=padding, return_tensors="pt", **options)


_latest: TestTimeFinetuner | None = None  # its graphs serve the next call for the same model


def _tuner_of(model: Any, lr: float, interval: int) -> TestTimeFinetuner:
    global _latest
    if _latest is None or _latest.model is not model or _latest.refresh_interval != interval:
        _latest = TestTimeFinetuner(model, refresh_interval=interval)
    _latest.lr = lr
    return _latest


def release() -> None:
    """Let go of the model finetuned last, and of what was recorded for it on a CUDA device.

    >>> from hullkit.interop import hullft
    >>> hullft.release()
    """
    global _latest
    _latest = None
