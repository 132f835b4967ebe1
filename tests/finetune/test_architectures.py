"""Every architecture of the table: finetuned as plain torch does it, and captured on a GPU."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from _architectures import ARCHITECTURES, VOCABULARY, build
from _models import same_bits, state
from hullkit import reference
from hullkit.finetune import AdaptReport, TestTimeFinetuner
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

pytestmark = [
    pytest.mark.plain_memory,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # models warn of kernels that are not installed
]
NAMES = [name for name in ARCHITECTURES if name in CONFIG_MAPPING]
COUNTS = [3, 2]
LR, EPS = 1e-3, 1e-3
# Two ways to add up float32 gradients, largest about 1, differ by some 2^-24 for each of the
# roundings on the longest path through a layer, about 32. Adam divides by sqrt(v) + eps, so one
# update differs by at most lr / eps times that.
BOUND = sum(COUNTS) * LR / EPS * 32 * 2.0**-24


def examples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in (12, 9)]


def adapted(model: nn.Module, **options: Any) -> tuple[AdaptReport, dict[str, Tensor]]:
    """The report and the weights in the block. The base weights are back afterwards."""
    base = state(model)
    tuner = TestTimeFinetuner(model, lr=LR, eps=EPS, **options)
    with tuner.adapted(examples(), COUNTS):
        weights = state(model)
    for name, tensor in model.state_dict().items():
        assert same_bits(tensor, base[name]), name
    assert tuner.last_report is not None
    return tuner.last_report, weights


def largest_difference(weights: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    return max(float((weights[n].double() - wanted[n].double()).abs().max()) for n in wanted)


def test_there_are_at_least_fifty() -> None:
    assert len(NAMES) >= 50


@pytest.mark.parametrize("name", NAMES)
def test_equals_plain_torch(name: str) -> None:
    model = build(name)
    plain = copy.deepcopy(model)
    losses = reference.finetune(plain, examples(), COUNTS, lr=LR, eps=EPS)
    report, weights = adapted(model)
    assert report.losses == pytest.approx(losses, rel=1e-5)
    assert largest_difference(weights, state(plain)) <= BOUND


# Architectures whose passes run eagerly on a GPU, and a part of the reason that the report gives.
EAGER: dict[str, str] = {}


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_captured_equals_eager(name: str) -> None:
    model = build(name).cuda()
    _, wanted = adapted(model, capture=False, fuse=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report, weights = adapted(model)
    print(name, report.path, report.reason, *report.fused)
    assert largest_difference(weights, wanted) <= BOUND
    assert (report.path == "eager") == (name in EAGER), report.reason
    assert EAGER.get(name, "") in (report.reason or "")
