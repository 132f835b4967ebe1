# SPDX-License-Identifier: Apache-2.0
"""Recipes are settings that the functions take."""

from __future__ import annotations

import hullkit
import pytest
import torch


@pytest.mark.parametrize("recipe", [hullkit.recipes.NEAREST, hullkit.recipes.PUBLISHED])
def test_a_recipe_runs(recipe: hullkit.recipes.Recipe) -> None:
    chosen = hullkit.select(torch.eye(4), torch.eye(4)[0], 3, **recipe.select)
    assert int(chosen.counts.sum()) == 3
    model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8))
    tuner = hullkit.TestTimeFinetuner(model, **recipe.finetune)
    assert tuner.adapt_([torch.tensor([1, 2, 3])], [2]).num_updates == 2
    assert tuner.betas == recipe.finetune["betas"]
