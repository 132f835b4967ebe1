# SPDX-License-Identifier: Apache-2.0
"""TestTimeFinetuner: float32 products in the passes, and torch's settings of them after it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from _models import COUNTS, plain, texts
from hullkit.finetune import TestTimeFinetuner, adaptation
from hullkit.language_model.product_settings import ProductSettings, matmul_precision

CUDA: Any = torch.backends.cuda.matmul
pytestmark = [
    pytest.mark.usefixtures("one_thread", "settings_as_torch_begins"),
    pytest.mark.skipif(not hasattr(CUDA, "fp32_precision"), reason="torch before 2.9"),
]


def backends() -> tuple[Any, ...]:
    return torch.backends, CUDA, torch.backends.mkldnn.matmul


@pytest.fixture
def settings_as_torch_begins() -> Iterator[None]:
    yield
    for backend in backends():
        backend.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for backend in backends():
        backend.fp32_precision = "none"


def told() -> list[str]:
    return [backend.fp32_precision for backend in backends()]


def set_to(place: str, value: str) -> None:
    if place == "common":
        torch.set_float32_matmul_precision(value)
    else:
        backends()[["all", "cuda", "cpu"].index(place)].fp32_precision = value


SETTINGS = [
    ("all", "none"),
    ("all", "ieee"),
    ("all", "tf32"),
    ("cuda", "tf32"),
    ("cpu", "bf16"),
    ("common", "high"),
    ("common", "medium"),
]


@pytest.mark.parametrize(("place", "value"), SETTINGS)
def test_a_query_gives_products_their_precision_and_puts_settings_back(
    place: str, value: str
) -> None:
    model = plain()
    set_to(place, value)
    before, inside = told(), []
    model.register_forward_hook(lambda *_: inside.append(told()[1:]))
    for _ in range(2):
        with TestTimeFinetuner(model).adapted(texts(), COUNTS):
            pass
        assert told() == before
    assert not adaptation.is_adapted(model)
    assert inside
    assert {precision for now in inside for precision in now} <= {"none", "ieee"}


@pytest.mark.parametrize(("place", "value"), SETTINGS)
@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_what_a_pass_sets(precision: str, place: str, value: str) -> None:
    set_to(place, value)
    before = ProductSettings.now()
    with matmul_precision(precision):
        _, cuda, _ = told()
        assert (cuda == "tf32") == (precision == "tf32")
    assert ProductSettings.now() == before


def test_a_wider_setting_reaches_products_after_a_query() -> None:
    with TestTimeFinetuner(plain()).adapted(texts(), COUNTS):
        pass
    with matmul_precision("tf32"):
        pass
    torch.backends.fp32_precision = "tf32"
    assert told() == ["tf32"] * 3
    with matmul_precision("float32"):
        assert told() == ["tf32", "ieee", "ieee"]
    torch.backends.fp32_precision = "ieee"
    assert told() == ["ieee"] * 3


def test_a_block_that_sets_them_keeps_its_own() -> None:
    with TestTimeFinetuner(plain()).adapted(texts(), COUNTS):
        CUDA.fp32_precision = "tf32"
    assert CUDA.fp32_precision == "tf32"


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_callers_autocast_stays_outside(precision: str) -> None:
    """Of the backward half too, whose products are the pass's."""
    model = plain()
    tuner = TestTimeFinetuner(model, lr=1e-2, precision=precision)
    found = []
    for on in (False, True):
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=on),
            tuner.adapted(texts(), COUNTS) as adapted,
        ):
            assert torch.is_autocast_enabled("cpu") == on
            found.append([p.detach().clone() for p in adapted.parameters()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
