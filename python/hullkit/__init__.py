"""hullkit: kernels for test-time finetuning of language models.

Choose, for one prompt, a sparse convex combination of training sequences (Frank-Wolfe over the hull
of a candidate pool), round it to an integer multiset, and spend each gradient on several updates.
Method: HullFT, arXiv 2605.30337.
"""

from . import optim
from ._native import __version__, build_info
from .finetune import AdaptReport, TestTimeFinetuner
from .greedy import SIFTResult, sift
from .metrics import bits_per_byte
from .multiset import Multiset, select
from .rounding import apportion, round_multiplicities
from .schedule import Reuse, reuse_schedule
from .selection import (
    FrankWolfeResult,
    KNNResult,
    LMOResult,
    Status,
    duplicates,
    frank_wolfe,
    knn,
    lmo,
)

__all__ = [
    "AdaptReport",
    "FrankWolfeResult",
    "KNNResult",
    "LMOResult",
    "Multiset",
    "Reuse",
    "SIFTResult",
    "Status",
    "TestTimeFinetuner",
    "__version__",
    "apportion",
    "bits_per_byte",
    "build_info",
    "duplicates",
    "frank_wolfe",
    "knn",
    "lmo",
    "optim",
    "reuse_schedule",
    "round_multiplicities",
    "select",
    "sift",
]
