# SPDX-License-Identifier: Apache-2.0
"""bench/ops/many_prompts.py on a small model, in bfloat16 and on a base of 4 bits."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="the demo's extra is not installed")
pytest.importorskip("peft", reason="an extra is not installed")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT))
    from bench.ops import many_prompts

    yield many_prompts
    sys.path.remove(str(ROOT))


# PEFT asks transformers by a name that transformers has since deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("base", "then"),
    [("bfloat16", "scored"), ("bfloat16", "generated"), ("bfloat16", ""), ("nf4", "")],
)
def test_rows_of_both_ways(
    bench: Any, base: str, then: str, tmp_path: Path, one_thread: None
) -> None:
    if base == "nf4":
        pytest.importorskip("bitsandbytes", reason="not installed")
    out = tmp_path / "rows.csv"
    options = ["--device", "cpu", "--models", "mistral-7b", "--shrink", "64", "--base", base]
    sizes = ["--slots", "2", "--tokens", "12", "--rounds", "1"]
    uses = [f"--{then}"] if then else []
    bench.main([*options, *sizes, *uses, "--out", str(out)])
    with out.open() as file:
        rows = list(csv.DictReader(file))
    wanted = ["TestTimeFinetuner, LoRA r=16", "TestTimeFinetuner, all weights", "PromptBatch r=16"]
    if base == "nf4":  # quantised weights cannot be trained
        wanted[1:2] = []
    if not then:
        wanted[:0] = ["PEFT, LoRA r=16"]
    assert [row["provider"] for row in rows] == wanted
    assert all(float(row["p50"]) > 0.0 and row["dtype"] == base for row in rows)
    assert all(row["shape"].endswith(then or "gradients=30") for row in rows)


def test_other_results_are_not_timed(bench: Any) -> None:
    found = bench.Found()
    for query, loss in enumerate((4.0, 3.0)):
        found.check(query, [loss] * 30, 2.0)
        found.check(query, [1.01 * loss] * 30, 2.01)
    found.check(0, [4.05] + [3.0] * 29, passes=1)
    with pytest.raises(AssertionError, match="near"):
        found.check(0, [4.0] * 29 + [3.0])
    with pytest.raises(AssertionError, match="near"):
        found.check(1, [4.0] * 30)
    with pytest.raises(AssertionError, match="near"):
        found.check(1, [3.0] * 30, 1.5)
    with pytest.raises(AssertionError, match="30 losses"):
        found.check(0, [4.0] * 29, passes=0)
    with pytest.raises(AssertionError, match="finite"):
        found.check(0, [4.0] * 29 + [float("nan")], passes=0)
    with pytest.raises(AssertionError, match="tokens"):
        found.check(0, [4.0] * 30, torch.zeros(3))
