# SPDX-License-Identifier: Apache-2.0
"""Texts to select from, and a vector for each: stand-ins for your corpus and your embeddings."""

from __future__ import annotations

import importlib
import inspect
import re
import zlib

import numpy as np


def passages(*modules: str, shortest: int = 120, longest: int = 400) -> list[str]:
    """Paragraphs of the sources of these modules, which are those of the standard library."""
    sources = [inspect.getsource(importlib.import_module(name)) for name in modules]
    paragraphs = [part.strip("\n") for source in sources for part in source.split("\n\n")]
    return [part[:longest] for part in paragraphs if len(part) >= shortest]


def embed(texts: list[str], dims: int = 256) -> np.ndarray:
    """Hashed counts of words, rows of unit length: (len(texts), dims) float32."""
    vectors = np.zeros((len(texts), dims), dtype=np.float32)
    for vector, text in zip(vectors, texts, strict=True):
        for word in re.findall(r"[a-z]{3,}", text.lower()):
            code = zlib.crc32(word.encode())
            vector[code % dims] += 1 if code & 1 << 20 else -1
    vectors = np.sign(vectors) * np.sqrt(np.abs(vectors))
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
