# SPDX-License-Identifier: Apache-2.0
"""The texts of a run: documents to train on, queries to score, and embeddings of both."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import hullkit
import torch

from bench.demo import corpus as source_files
from bench.demo.embedding import Embedding
from bench.harness import texts

NUM_CANDIDATES = 200  # as in the published runs
STDLIB = "stdlib"


class Corpus(NamedTuple):
    name: str
    documents: list[str]
    queries: list[str]
    data: texts.Embeddings


def shared_format(folder: Path, subset: str, queries: int) -> Corpus:
    """A subset as bench/harness/texts.py describes it; candidates as they are stored."""
    data = texts.embeddings(folder, subset, slice(queries)).float()
    asked = texts.queries(folder, subset)[:queries]
    return Corpus(subset, texts.documents(folder, subset), asked, data)


def source_folder(folder: Path, name: str, queries: int) -> Corpus:
    """Chunks of a folder's text files. Queries come from files that the documents have no part of.
    Embeddings are the demo's, which need no model."""
    files = source_files.read_chunks(folder)
    if not files:
        raise ValueError(f"--text: expected text files under {str(folder)!r}, found none")
    split = source_files.split(files, queries)
    documents = [chunk.text for chunk in split.pool]
    asked = [chunk.text for chunk in split.queries]
    embedding = Embedding()
    pool = torch.from_numpy(embedding.fit(documents))
    query = torch.from_numpy(embedding(asked))
    candidates = hullkit.knn(pool, query, min(NUM_CANDIDATES, len(pool))).indices
    return Corpus(name, documents, asked, texts.Embeddings(pool, query, candidates))


def load(folder: Path | None, subsets: list[str] | None, queries: int) -> list[Corpus]:
    """The standard library if there is no folder; of one in the shared format its subsets."""
    if folder is None:
        return [source_folder(source_files.stdlib_folder(), STDLIB, queries)]
    found = sorted(path.name.removesuffix(".emb.npy") for path in folder.glob("*.emb.npy"))
    if not found:
        return [source_folder(folder, folder.name, queries)]
    return [shared_format(folder, subset, queries) for subset in subsets or found]
