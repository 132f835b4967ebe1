# SPDX-License-Identifier: Apache-2.0
"""A causal language model and its tokens, whatever the tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

OWN_MODEL = Path(__file__).parents[1] / "assets" / "pybytes"


class LanguageModel(NamedTuple):
    """A model on one device, and the tokenizer that goes with it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


class Tokens(NamedTuple):
    """Token ids (T,) int64 and the UTF-8 bytes that all but the first of them spell."""

    ids: Tensor
    scored_bytes: int


def load(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Load a local folder or a model of the Hugging Face Hub, its weights in `dtype`.

    Raises:
        ValueError: no causal language model by that name, or only a slow tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            "--model: expected a folder or Hub name of a causal language model in Hugging Face "
            f"format, got {name!r} ({str(error).splitlines()[0]})"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(
            "--model: expected a model with a fast tokenizer (which knows the text that a token "
            f"spells), got {name!r}"
        )
    # Whatever dtype they are stored in, which is the one that they are loaded in.
    return LanguageModel(model.to(device, dtype).eval(), tokenizer)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tokens:
    """Tokens of a whole chunk. A first token inside a character counts as that character."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    first_end = encoded["offset_mapping"][0][1]
    ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    return Tokens(ids, len(text[first_end:].encode()))
