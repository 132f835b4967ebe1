# SPDX-License-Identifier: Apache-2.0
"""Finetuning in place: every text padded to max_length, every reused gradient a set of clones."""

from __future__ import annotations

import time
from typing import Any

import torch


def finetune_on_texts(
    model: Any,
    tokenizer: Any,
    texts: Any,
    batch_size: int = 1,
    max_length: int = 1024,
    lr: float = 5e-5,
    device: Any = None,
) -> dict[str, Any]:
    batches = [(list(texts[i : i + batch_size]), 1) for i in range(0, len(texts), batch_size)]
    return _finetune(model, tokenizer, batches, 1, max_length, lr)


def finetune_with_approach(
    model: Any,
    tokenizer: Any,
    texts: Any,
    approach_config: Any,
    batch_size: int = 1,
    max_length: int = 1024,
    lr: float = 5e-5,
    device: Any = None,
) -> dict[str, Any]:
    method = approach_config["method"]
    if method == "standard":
        report = finetune_on_texts(model, tokenizer, texts, batch_size, max_length, lr, device)
        return {**report, "finetune_approach": method}
    groups: list[tuple[list[str], int]] = []
    for text in texts:
        last = len(groups) - 1
        known = range(last, last + 1) if method == "sift_consecutive_refresh" else range(last + 1)
        at = next((i for i in known if i >= 0 and groups[i][0] == [text]), None)
        if at is None:
            groups.append(([text], 1))
        else:
            groups[at] = (groups[at][0], groups[at][1] + 1)
    interval = approach_config.get("refresh_interval", 2)
    report = _finetune(model, tokenizer, groups, interval, max_length, lr)
    sizes = {"finetune_unique_texts": len(groups), "finetune_total_texts": len(texts)}
    return {**report, "finetune_approach": method, **sizes}


def _finetune(
    model: Any, tokenizer: Any, groups: Any, interval: int, max_length: int, lr: float
) -> dict[str, Any]:
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    start, steps = time.perf_counter(), 0
    for texts, count in groups:
        inputs = tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        )
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        cached: list[Any] = []
        for update in range(count):
            if update % interval == 0:
                optimizer.zero_grad()
                model(**inputs, labels=labels).loss.backward()
                cached = [p.grad.clone() for p in parameters]
            for parameter, grad in zip(parameters, cached, strict=True):
                parameter.grad = grad.clone()
            optimizer.step()
            steps += 1
    optimizer.zero_grad()
    model.eval()
    return {"finetune_steps": steps, "finetune_seconds": time.perf_counter() - start}
