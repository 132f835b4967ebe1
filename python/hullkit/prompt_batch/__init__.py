# SPDX-License-Identifier: Apache-2.0
"""Many prompts at once: a slot of low-rank adapters for each, on one frozen model."""

from .batch import PromptBatch
from .prefetch import prefetched
from .queries import Answer, Generate, Query, Score

__all__ = ["Answer", "Generate", "PromptBatch", "Query", "Score", "prefetched"]
