# SPDX-License-Identifier: Apache-2.0
"""hullkit: kernels for test-time finetuning of language models.

Choose, for one prompt, a sparse convex combination of training sequences (Frank-Wolfe over the hull
of a candidate pool), round it to an integer multiset, and spend each gradient on several updates.
Method: HullFT, arXiv 2605.30337.
"""

from . import optim, prompt_batch, recipes, reference
from .finetune import AdaptReport, Reuse, TestTimeFinetuner, reuse_schedule
from .language_model import bits_per_byte
from .native.kernels import __version__, build_info
from .prompt_batch import Answer, PromptBatch, Query
from .selection import (
    FrankWolfeResult,
    KNNResult,
    LMOResult,
    Multiset,
    SIFTResult,
    Status,
    apportion,
    duplicates,
    frank_wolfe,
    knn,
    lmo,
    round_multiplicities,
    select,
    sift,
)

__all__ = [
    "AdaptReport",
    "Answer",
    "FrankWolfeResult",
    "KNNResult",
    "LMOResult",
    "Multiset",
    "PromptBatch",
    "Query",
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
    "prompt_batch",
    "recipes",
    "reference",
    "reuse_schedule",
    "round_multiplicities",
    "select",
    "sift",
]
