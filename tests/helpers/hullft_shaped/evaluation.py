# SPDX-License-Identifier: Apache-2.0
"""A model finetuned on the selected texts, scored, and restored by its caller."""

from __future__ import annotations

from typing import Any

import torch

from .finetune import finetune_on_texts, finetune_with_approach


def evaluate(
    model: Any, tokenizer: Any, texts: Any, scored: str, approach: Any, **options: Any
) -> dict[str, Any]:
    initial = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    finetune_on_texts(model, tokenizer, texts[:1], **options)  # a warm-up
    model.load_state_dict(initial)
    result = finetune_with_approach(model, tokenizer, texts, approach_config=approach, **options)
    with torch.no_grad():
        ids = tokenizer([scored], return_tensors="pt")["input_ids"]
        result["loss"] = model(ids, labels=ids).loss.item()
    result["adapted"] = {n: tensor.clone() for n, tensor in model.state_dict().items()}
    result["training"] = model.training
    model.load_state_dict(initial)
    return result
