# SPDX-License-Identifier: Apache-2.0
"""The oracles: every operation as the naive float64 procedure, one problem at a time, in NumPy.

They say what the kernels must compute, serve as `backend="reference"`, and are what tests and
benchmarks compare with. Readable first; slow.
"""

from .apportion import apportion, quotas
from .auto_total import auto_total, ladder
from .duplicates import duplicates
from .finetune import finetune
from .frank_wolfe import FrankWolfeOutcome, frank_wolfe
from .knn import knn
from .lmo import lmo, row_dots
from .optim import accumulate, adam, global_norm, sgd
from .round_multiplicities import round_multiplicities
from .sift import SIFTOutcome, sift

__all__ = [
    "FrankWolfeOutcome",
    "SIFTOutcome",
    "accumulate",
    "adam",
    "apportion",
    "auto_total",
    "duplicates",
    "finetune",
    "frank_wolfe",
    "global_norm",
    "knn",
    "ladder",
    "lmo",
    "quotas",
    "round_multiplicities",
    "row_dots",
    "sgd",
    "sift",
]
