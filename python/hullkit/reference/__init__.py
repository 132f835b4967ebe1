# SPDX-License-Identifier: Apache-2.0
"""The oracles: every operation as the naive float64 procedure, one problem at a time, in NumPy.

They say what the kernels must compute, serve selection as `backend="reference"`, and are what tests
and benchmarks compare with. Readable first; slow. Arguments are taken as they come: the public
functions check them.
"""

from .apportion import apportion
from .apportion import quotas as quotas  # a helper of tests, not public
from .auto_total import auto_total
from .auto_total import ladder as ladder  # select asks it, too
from .duplicates import duplicates
from .finetune import finetune
from .frank_wolfe import FrankWolfeOutcome, frank_wolfe
from .knn import knn
from .lmo import lmo
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
    "lmo",
    "round_multiplicities",
    "sgd",
    "sift",
]
