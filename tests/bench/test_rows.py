# SPDX-License-Identifier: Apache-2.0
"""bench/harness: rows say what was measured and how; losses tell what must not be timed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def harness() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT))
    from bench.harness import losses, rows

    yield SimpleNamespace(rows=rows, losses=losses)
    sys.path.remove(str(ROOT))


def test_quantiles_of_two_lie_between_them(harness: Any) -> None:
    assert harness.rows.quantiles([4.0, 2.0]) == {"p20": 2.4, "p50": 3.0, "p80": 3.6}
    assert harness.rows.quantiles([1.0]) == {"p20": 1.0, "p50": 1.0, "p80": 1.0}


def test_a_command_names_no_place_on_a_machine(
    harness: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = ModuleType("__main__")
    main.__spec__ = SimpleNamespace(name="bench.ttft.__main__")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["", "--model", "/a/b/small", "--out", "/x.csv", "--k", "a b"])
    assert harness.rows.command() == "python -m bench.ttft --model small --k 'a b'"
    given = ["--out=/x.csv", "--slots", "2"]
    assert harness.rows.command(given) == "python -m bench.ttft --slots 2"


def test_a_row_of_what_could_not_be_measured(harness: Any) -> None:
    row = harness.rows.row("op", "us", "n=2", torch.bfloat16, [], unit="s", peak_mb=3)
    assert set(row) <= set(harness.rows.FIELDS)
    assert (row["p50"], row["rounds"], row["dtype"], row["unit"]) == ("", 0, "bfloat16", "s")
    assert row["peak_mb"] == 3
    assert row["threads"] == torch.get_num_threads()


def test_losses_that_are_lost_or_others(harness: Any) -> None:
    agree = harness.losses.agree
    agree([4.0, 9.0], [4.05])
    for losses, wanted in (([4.0], [4.1]), ([4.0], [4.0, 4.0]), ([4.0, float("nan")], [4.0])):
        with pytest.raises(AssertionError, match="expected"):
            agree(losses, wanted)


def test_a_fingerprint_sees_one_bit(harness: Any) -> None:
    model = nn.Linear(3, 2).bfloat16()
    before = harness.losses.fingerprint(model)
    assert harness.losses.fingerprint(model) == before
    with torch.no_grad():
        model.weight.view(torch.int16)[0, 0] ^= 1
    assert harness.losses.fingerprint(model) != before
