# SPDX-License-Identifier: Apache-2.0
"""Embeddings that need no download: hashed tf-idf of n-grams, or the language model's own states.

`compare_embeddings.py` measures what each is worth to nearest-neighbour finetuning; the demo uses
`Embedding()` as it stands.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

BINS = 1 << 18  # of n-gram hashes, for document frequencies
# Parts of snake_case and CamelCase names, numbers, signs.
WORD = re.compile(r"[A-Za-z][a-z]*|[0-9]+|[^\sA-Za-z0-9_]")


def word_grams(text: str) -> np.ndarray:
    """Hashes of single words and of pairs of neighbouring words, lower case."""
    words = [word.lower() for word in WORD.findall(text)]
    grams = words + [f"{a} {b}" for a, b in itertools.pairwise(words)]
    return np.array([zlib.crc32(gram.encode()) for gram in grams], dtype=np.uint64)


def byte_grams(text: str) -> np.ndarray:
    """Hashes of every run of three, four and five bytes."""
    raw = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint64)
    codes = []
    for n in (3, 4, 5):
        code = np.full(max(0, len(raw) - n + 1), n, dtype=np.uint64)
        for i in range(n):
            code = code * np.uint64(257) + raw[i : i + len(code)]
        codes.append(code)
    mixed = np.concatenate(codes) * np.uint64(0x9E3779B97F4A7C15)  # wraps: a multiplicative hash
    return mixed >> np.uint64(32)


class Embedding:
    """Signed-hashed tf-idf, projected on the principal axes of the pool, rows of unit length.

    An n-gram's weight is (1 + log count) * log(N / document frequency). Hashing to `width` signed
    bins keeps inner products in expectation; the projection to `dims` axes then drops most of the
    collisions' noise and relates n-grams that occur together (latent semantic analysis).
    """

    def __init__(
        self, grams: Callable[[str], np.ndarray] = word_grams, dims: int = 384, width: int = 2048
    ) -> None:
        self.grams, self.dims, self.width = grams, dims, width

    def fit(self, pool: list[str]) -> np.ndarray:
        """Learn frequencies and axes from the pool and embed it. [M, min(M, dims)] float32"""
        counted = [
            self._count(text) for text in tqdm(pool, desc="embedding", unit="chunk", leave=False)
        ]
        frequency = np.zeros(BINS)
        for bins, _ in counted:
            frequency[bins] += 1
        self._idf = np.log((1 + len(pool)) / (1 + frequency))
        hashed = np.stack([self._hash(*pair) for pair in counted])  # [M, width]
        if len(pool) < self.width:
            axes = np.linalg.svd(hashed, full_matrices=False)[2].T
        else:
            axes = np.linalg.eigh(hashed.T @ hashed)[1][:, ::-1]  # the largest one is the last
        self._axes = axes[:, : self.dims]
        return unit_rows(hashed @ self._axes)

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Embed with what `fit` learned. [len(texts), dims] float32"""
        return unit_rows(np.stack([self._hash(*self._count(t)) for t in texts]) @ self._axes)

    def _count(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        return np.unique(self.grams(text) % np.uint64(BINS), return_counts=True)

    def _hash(self, bins: np.ndarray, counts: np.ndarray) -> np.ndarray:
        weights = (1 + np.log(counts)) * self._idf[bins]
        scattered = bins * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)
        signs = 1.0 - 2.0 * (scattered & np.uint64(1))
        slots = (scattered >> np.uint64(1)) % np.uint64(self.width)
        row = np.bincount(slots.astype(np.int64), signs * weights, minlength=self.width)
        return (row / max(np.linalg.norm(row), 1e-12)).astype(np.float32)


class StateEmbedding:
    """Mean over positions of the model's hidden states at one layer, less the pool's mean."""

    def __init__(self, model: nn.Module, tokens: Callable[[str], Tensor], layer: int) -> None:
        self.model, self.tokens, self.layer = model, tokens, layer

    def fit(self, pool: list[str]) -> np.ndarray:
        """Learn the mean from the pool and embed it. [M, hidden] float32"""
        states = self._states(pool)
        self._mean = states.mean(0)
        return unit_rows(states - self._mean)

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Embed with the pool's mean. [len(texts), hidden] float32"""
        return unit_rows(self._states(texts) - self._mean)

    @torch.no_grad()
    def _states(self, texts: list[str]) -> np.ndarray:
        means = []
        device = next(self.model.parameters()).device
        for start in tqdm(range(0, len(texts), 128), desc="embedding", unit="batch", leave=False):
            # Padded on the right: causal attention keeps the padding out of the text's own states.
            ids = [self.tokens(text) for text in texts[start : start + 128]]
            batch = pad_sequence(ids, batch_first=True, padding_value=-1).to(device)
            states = self.model(input_ids=batch.clamp(min=0), output_hidden_states=True)
            real = (batch >= 0)[..., None]
            total = (states.hidden_states[self.layer] * real).sum(1)
            means.append((total / real.sum(1)).cpu())
        return torch.cat(means).float().numpy()


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, so that an inner product is a cosine. float32"""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.ascontiguousarray(rows / np.maximum(lengths, 1e-12), dtype=np.float32)
