# SPDX-License-Identifier: Apache-2.0
"""Texts, embeddings and a language model, as the quality benchmarks read them.

A folder of texts holds for each subset S: S.jsonl.gz and S.queries.jsonl.gz (lines with "text"),
and as NumPy arrays S.emb.npy [M, d], S.query_emb.npy [Q, d] and S.candidates.npy [Q, n], rows of
emb. A document that is no query's candidate may be empty. The model is a folder of transformers,
tokenizer included.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bench.harness.rows import ROOT

OWN_MODEL = ROOT / "bench" / "assets" / "pybytes"


class Embeddings(NamedTuple):
    pool: Tensor  # [M, d]
    query: Tensor  # [Q, d]
    candidates: Tensor  # [Q, n]

    def float(self) -> Embeddings:
        return self._replace(pool=self.pool.float(), query=self.query.float())


def embeddings(folder: Path, subset: str, queries: slice = slice(None)) -> Embeddings:
    """As stored, but candidates are int64; of these queries."""
    pool, query, candidates = (
        torch.from_numpy(np.load(folder / f"{subset}.{part}.npy"))
        for part in ("emb", "query_emb", "candidates")
    )
    return Embeddings(pool, query[queries], candidates[queries].long())


def texts(path: Path) -> list[str]:
    with gzip.open(path, "rt") as file:
        return [json.loads(line)["text"] for line in file]


def documents(folder: Path, subset: str) -> list[str]:
    return texts(folder / f"{subset}.jsonl.gz")


def queries(folder: Path, subset: str) -> list[str]:
    return texts(folder / f"{subset}.queries.jsonl.gz")


class Tokens:
    """Text to token ids, the start token before them, cut at max_length.

    start: default: the tokenizer's bos, of one that has none its eos.
    """

    def __init__(self, model: Path, start: str | None, max_length: int) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = _loaded(AutoTokenizer.from_pretrained, model)
        token = start or self._tokenizer.bos_token or self._tokenizer.eos_token
        self._start = [self._tokenizer.convert_tokens_to_ids(token)]
        self._max_length = max_length

    def __call__(self, text: str) -> Tensor:
        ids = self._start + self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids[: self._max_length])

    def scored_bytes(self, ids: Tensor) -> int:
        return len(self._tokenizer.decode(ids[1:]).encode())


def language_model(path: Path, device: torch.device) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = _loaded(AutoModelForCausalLM.from_pretrained, path)
    return model.to(device, torch.float32)


def _loaded(load: Callable[[Path], Any], path: Path) -> Any:
    try:
        return load(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            "--model: expected a folder or Hub name of a causal language model in Hugging Face "
            f"format, got {str(path)!r} ({str(error).splitlines()[0]})"
        ) from error


def add_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument("--texts", type=Path, required=required, help="see bench/harness/texts.py")
    parser.add_argument("--model", type=Path, required=required)
    parser.add_argument("--queries", type=int, default=20, help="of each subset")
    parser.add_argument("--start", help="token before a text, default: the tokenizer's bos")
    parser.add_argument("--max-length", type=int, default=1024)
