"""Many prompts at once: a slot of low-rank adapters for each, on one frozen model."""

from .batch import PromptBatch
from .queries import Answer, Query, generate, score

__all__ = ["Answer", "PromptBatch", "Query", "generate", "score"]
