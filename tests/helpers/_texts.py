# SPDX-License-Identifier: Apache-2.0
"""A few small texts in the format of bench/harness/texts.py."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
]


def write_texts(folder: Path) -> None:
    """Two subsets, "one" and "two", of alike but not equal texts."""
    generator = np.random.default_rng(0)
    for subset in ("one", "two"):
        for part, count in (("", 30), (".queries", 3)):
            lines = [
                json.dumps({"text": f"{WORDS[i % 12]} {WORDS[i % 7]} {i}\n" * 3})
                for i in range(count)
            ]
            with gzip.open(folder / f"{subset}{part}.jsonl.gz", "wt") as file:
                file.write("\n".join(lines))
        pool, query = generator.normal(size=(30, 8)), generator.normal(size=(3, 8))
        np.save(folder / f"{subset}.emb.npy", pool)
        np.save(folder / f"{subset}.query_emb.npy", query)
        np.save(folder / f"{subset}.candidates.npy", np.argsort(-query @ pool.T)[:, :20])
