# SPDX-License-Identifier: Apache-2.0
"""Every architecture of the table: finetuned as plain torch does it, and captured on a GPU."""

from __future__ import annotations

import copy

import pytest
from _architectures import (
    BOUND,
    COUNTS,
    EPS,
    LR,
    NAMES,
    adapted,
    build,
    examples,
    largest_difference,
)
from _models import same_bits, state
from hullkit import reference
from torch import Tensor, nn

pytestmark = [
    pytest.mark.plain_memory,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # models warn of kernels that are not installed
]


def check_restored(model: nn.Module, base: dict[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert same_bits(tensor, base[name]), name


def test_there_are_at_least_fifty() -> None:
    assert len(NAMES) >= 50


@pytest.mark.parametrize("name", NAMES)
def test_equals_plain_torch(name: str) -> None:
    model = build(name)
    plain = copy.deepcopy(model)
    losses = reference.finetune(plain, examples(), COUNTS, lr=LR, eps=EPS)
    base = state(model)
    report, weights = adapted(model)
    check_restored(model, base)
    assert report.losses == pytest.approx(losses, rel=1e-5)
    assert largest_difference(weights, state(plain)) <= BOUND


# Architectures whose passes run eagerly on a GPU, and a part of the reason that the report gives.
EAGER = {"jetmoe": "forward asks the device for values"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_captured_equals_eager(name: str) -> None:
    model = build(name).cuda()
    _, wanted = adapted(model, capture=False, fuse=False)
    base = state(model)
    report, weights = adapted(model)
    check_restored(model, base)
    print(name, report.path, report.reason, *report.fused)
    assert largest_difference(weights, wanted) <= BOUND
    assert (report.path == "eager") == (name in EAGER), report.reason
    assert EAGER.get(name, "") in (report.reason or "")
