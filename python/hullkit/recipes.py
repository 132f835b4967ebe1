# SPDX-License-Identifier: Apache-2.0
"""Settings of selection and finetuning that were found to spend a query's seconds well."""

from __future__ import annotations

from typing import Any, NamedTuple


class Recipe(NamedTuple):
    """How examples are chosen, and how the model is trained on them.

    Attributes:
        select: keyword arguments of :func:`hullkit.select`, beside pool, query and total.
        finetune: keyword arguments of :class:`hullkit.TestTimeFinetuner`, beside the model.

    >>> import hullkit
    >>> hullkit.recipes.NEAREST.select
    {'method': 'knn'}
    """

    select: dict[str, Any]
    finetune: dict[str, Any]


NEAREST = Recipe({"method": "knn"}, {"lr": 2e-4, "betas": (0.5, 0.9), "refresh_interval": 1})
"""Nearest neighbours, one update each, with short memories of the gradient.

With `total` = 16 it was ahead of nearest neighbours and of SIFT, each at its own best learning rate
and torch's betas, on the mean of four kinds of text. On two of the four it was ahead of nearest
neighbours by more than the error, on none behind by more. It was found on other queries than it was
judged on. A query makes few updates, and Adam's usual betas average over more than there are.

>>> import hullkit, torch
>>> model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
>>> hullkit.TestTimeFinetuner(model, **hullkit.recipes.NEAREST.finetune).lr
0.0002

Source: docs/inference_costs.md. Measured with one model of 135 million parameters; try rates of
your own for another.
"""

PUBLISHED = Recipe({"method": "hull"}, {"lr": 5e-5, "betas": (0.9, 0.999), "refresh_interval": 2})
"""The settings that HullFT is published with (arXiv 2605.30337)."""
