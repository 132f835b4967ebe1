# SPDX-License-Identifier: Apache-2.0
"""Code written for activeft's Retriever, on hullkit's kernels: the import is all that changes.

from activeft.sift import Retriever            # before
from hullkit.interop.activeft import Retriever   # after
"""

import time

import faiss
import hullkit
import numpy as np
from hullkit.interop.activeft import Retriever

# A corpus and prompts, as embeddings of unit length around common centres: stand-ins for yours.
rng = np.random.default_rng(0)
centres = rng.standard_normal((50, 256))


def embeddings(count: int) -> np.ndarray:
    around = centres[rng.integers(len(centres), size=count)] + rng.standard_normal((count, 256))
    return (around / np.linalg.norm(around, axis=1, keepdims=True)).astype("float32")


corpus, prompts = embeddings(5000), embeddings(16)

# The calling code, as it is.
index = faiss.IndexFlatIP(256)
index.add(corpus)
retriever = Retriever(index, llambda=0.01)
values, indices, vectors, seconds = retriever.search(prompts[:1], N=20, K=200)
print("one prompt:", len(set(indices.tolist())), "distinct examples, uncertainty", -values[-1])

started = time.perf_counter()
values, indices, vectors, seconds = retriever.batch_search(prompts[:, None], N=20, K=200)
ours = time.perf_counter() - started
print(f"{len(prompts)} prompts: {1e3 * ours:.1f} ms, of which faiss {1e3 * seconds.faiss:.1f} ms")

# How long the same takes without hullkit's kernels: in activeft, if it is here, else in NumPy.
try:
    from activeft.sift import Retriever as Theirs
except ImportError:
    name, few = "the naive float64 procedure", 2
    pools = corpus[index.search(prompts[:few], 200)[1]].astype("float64")
    started = time.perf_counter()
    for pool, prompt in zip(pools, prompts.astype("float64"), strict=False):
        hullkit.reference.sift(pool, prompt, 20, 0.01)
else:
    name, few = "activeft", 2
    their_retriever = Theirs(index, llambda=0.01)
    started = time.perf_counter()
    for b in range(few):
        their_retriever.search(prompts[b : b + 1], N=20, K=200)
theirs = (time.perf_counter() - started) / few * len(prompts)
print(f"{name} takes {theirs / ours:.0f} times as long a prompt")
