# SPDX-License-Identifier: Apache-2.0
"""Which training sequences, and how often: one file an operation."""

from .apportion import apportion
from .duplicates import duplicates
from .frank_wolfe import frank_wolfe
from .knn import knn
from .lmo import lmo
from .results import (
    FrankWolfeResult,
    KNNResult,
    LMOResult,
    Multiset,
    SIFTResult,
    Status,
)
from .round_multiplicities import round_multiplicities
from .select import select
from .sift import sift

__all__ = [
    "FrankWolfeResult",
    "KNNResult",
    "LMOResult",
    "Multiset",
    "SIFTResult",
    "Status",
    "apportion",
    "duplicates",
    "frank_wolfe",
    "knn",
    "lmo",
    "round_multiplicities",
    "select",
    "sift",
]
