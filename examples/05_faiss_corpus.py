# SPDX-License-Identifier: Apache-2.0
"""A corpus in a faiss index: search it, then select among the neighbours it found."""

import faiss
import hullkit
from passages import embed, passages

texts = passages(
    "argparse", "bisect", "collections", "configparser", "csv", "dataclasses", "datetime", "enum",
    "functools", "heapq", "inspect", "json.decoder", "logging", "pathlib", "queue", "random",
    "shutil", "statistics", "subprocess", "tarfile", "textwrap", "threading", "typing", "zipfile",
)  # fmt: skip
corpus = embed(texts)  # (M, d): on disk, numpy.load(..., mmap_mode="r") does as well
index = faiss.IndexFlatIP(corpus.shape[1])
index.add(corpus)

prompts = embed(["lock a thread and wait", "read rows of a csv file", "extract a zip archive"])
_, candidates = index.search(prompts, 64)  # rows of the corpus, (B, 64), -1 = none

# Nothing is gathered: the kernels read the candidates' rows where they lie in the corpus.
chosen = hullkit.select(corpus, prompts, total=10, candidates=candidates)
for rows, counts in zip(chosen.rows, chosen.counts, strict=True):
    multiset = {int(row): int(count) for row, count in zip(rows, counts, strict=True) if count > 0}
    print(multiset, "heaviest:", " ".join(texts[rows[0]].split()[:12]))
