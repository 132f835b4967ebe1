# SPDX-License-Identifier: Apache-2.0
"""Bits per byte in float64 from a table of logits."""

from __future__ import annotations

from typing import Any

import numpy as np


def bits_per_byte(logits: Any, input_ids: Any, num_bytes: int) -> float:
    """-sum_{t=1}^{T-1} log2 softmax(logits[t-1])[id_t] / num_bytes; logits (T, V), ids (T,)."""
    table = np.asarray(logits, dtype=np.float64)
    ids = np.asarray(input_ids)
    nats = 0.0
    for t in range(1, len(ids)):
        row = table[t - 1] - table[t - 1].max()
        nats -= row[ids[t]] - np.log(np.exp(row).sum())
    return float(nats / np.log(2.0) / num_bytes)
