# SPDX-License-Identifier: Apache-2.0
"""What torch makes tensors on by default is the user's choice, and not where our helpers go."""

from __future__ import annotations

import copy
from typing import Any

import hullkit
import pytest
import torch
from _models import plain
from _optim import equal_bits
from hullkit import optim
from torch import nn

pytestmark = pytest.mark.plain_memory
OPTIMIZERS = ["Adam", "AdamW", "SGD"]
STEPS = ["step", "step_with", "update_in_backward"]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("how", STEPS)
def test_default_device_of_steps(how: str, name: str) -> None:
    """Tables and counters are where they belong whatever torch makes tensors on by default."""
    models = [nn.Linear(3, 3)]
    models.append(copy.deepcopy(models[0]))
    for model, device in zip(models, ("cpu", "meta"), strict=True):
        optimizer = getattr(optim, name)(model.parameters(), max_grad_norm=None)
        loss = model(torch.ones(2, 3)).square().sum()
        params = list(model.parameters())
        with torch.device(device):
            if how == "update_in_backward":
                with optimizer.update_in_backward(num_steps=2):
                    loss.backward()
            else:
                grads = torch.autograd.grad(loss, params)
                if how == "step_with":
                    optimizer.step_with(dict(zip(params, grads, strict=True)), num_steps=2)
                else:
                    for param, grad in zip(params, grads, strict=True):
                        param.grad = grad
                    optimizer.max_grad_norm = 1e9
                    optimizer.step(num_steps=2)
                    optimizer.state_dict()
    assert equal_bits(*(list(model.parameters()) for model in models))


def test_default_device_of_a_loaded_counter() -> None:
    """Old state dicts have plain numbers as step counters."""
    param = nn.Parameter(torch.ones(3))
    optimizer = optim.Adam([param])
    optimizer.state[param] = {"step": 3}
    param.grad = torch.ones(3)
    with torch.device("meta"):
        optimizer.step()
    assert optimizer.state[param]["step"].item() == 4


def test_default_device_of_accumulation() -> None:
    into = [torch.zeros(3)]
    with torch.device("meta"):
        norm = optim.accumulate_(into, [torch.ones(3, device="cpu")], norm=True)
        nothing = optim.accumulate_(into, [None], norm=True)
        empty = optim.accumulate_([], [], norm=True)
    assert [x is not None and x.device.type for x in (norm, nothing, empty)] == ["cpu"] * 3
    assert into[0].tolist() == [1.0] * 3


def selections() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(20, 6, generator=generator)
    query = torch.randn(3, 6, generator=generator)
    lengths = torch.tensor([20, 12, 5])
    candidates = torch.arange(20).repeat(3, 1)
    batch = pool.repeat(3, 1, 1)
    hull = hullkit.frank_wolfe(pool, query)
    model = plain()
    tokens = torch.arange(8)
    array = pool.numpy()
    return {
        "lmo": lambda: hullkit.lmo(pool, query, candidates=candidates),
        "knn": lambda: hullkit.knn(batch, query, 4, lengths=lengths),
        "duplicates": lambda: hullkit.duplicates(pool, eps=0.1),
        "frank_wolfe": lambda: hullkit.frank_wolfe(batch, query, lengths=lengths),
        "fully corrective": lambda: hullkit.frank_wolfe(pool, query, variant="fully_corrective"),
        "reference": lambda: hullkit.frank_wolfe(pool, query, backend="reference"),
        "round_multiplicities": lambda: hullkit.round_multiplicities(pool, query, hull, 9),
        "apportion": lambda: hullkit.apportion(hull.weights, 9),
        "sift": lambda: hullkit.sift(pool, query, 9),
        "select hull": lambda: hullkit.select(pool, query, 9, merge_duplicates=0.1),
        "select knn": lambda: hullkit.select(pool, query, 9, method="knn", max_multiplicity=2),
        "select sift": lambda: hullkit.select(pool, query, 9, method="sift"),
        "select auto": lambda: hullkit.select(pool, query, "auto", max_total=9),
        "arrays": lambda: hullkit.select(array, array[0], 9),
        "reuse_schedule": lambda: hullkit.reuse_schedule(torch.tensor([3, 1], device="cpu")),
        "bits_per_byte": lambda: hullkit.bits_per_byte(model, tokens, 8),
    }


@pytest.mark.parametrize("name", list(selections()))
def test_default_device_of_selection(name: str) -> None:
    call = selections()[name]
    wanted = call()
    with torch.device("meta"):
        got = call()
    assert repr(got) == repr(wanted)
