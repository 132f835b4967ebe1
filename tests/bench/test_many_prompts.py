# SPDX-License-Identifier: Apache-2.0
"""bench/quality/many_prompts.py on a small model: a stream with bad queries, and texts."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _texts import write_texts

pytest.importorskip("rich", reason="the demo's extra is not installed")
pytest.importorskip("peft", reason="an extra is not installed")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT))
    from bench.quality import many_prompts

    yield many_prompts
    sys.path.remove(str(ROOT))


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {row["figure"]: row["value"] for row in rows}


def test_a_stream_with_every_kind_of_bad_query(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    out = tmp_path / "the rows.csv"
    wrong = len(bench.BAD)
    options = ["--device", "cpu", "--shrink", "64", "--dtype", "float32", "--slots", "4"]
    sizes = ["--queries", str(2 * wrong), "--bad", str(wrong), "--sample", "4", "--longest", "12"]
    found = figures(bench.main(["stream", *options, *sizes, "--out", str(out)]))
    assert (found["right answers"], found["errors that name theirs"]) == (wrong, wrong)
    assert float(found["largest difference from alone"]) <= bench.BOUNDS["float32"]
    assert "\nmet" in capsys.readouterr().out
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["count"] for row in rows[:2]} == {str(wrong)}
    # What a shell takes, without the folders of this machine.
    assert all(row["command"].endswith(" --out 'the rows.csv'") for row in rows)
    assert all(str(tmp_path) not in row["command"] for row in rows)


# PEFT asks transformers by a name that transformers has since deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_slots_score_as_an_adapter_of_peft(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    write_texts(tmp_path)
    options = ["--device", "cpu", "--texts", str(tmp_path), "--queries", "2", "--slots", "5"]
    rows = bench.main(["texts", *options, "--max-length", "24", "--total", "4"])
    assert [row["shape"].partition(" ")[0] for row in rows] == ["one"] * 10 + ["two"] * 10
    found = figures(rows)
    assert float(found["BPB, PEFT alone"]) != float(found["BPB, unadapted"])
    assert abs(float(found["mean from PEFT alone"])) <= bench.PEFT_BOUND
    assert float(found["largest difference from one slot"]) == 0.0
    assert 0.0 < float(found["PEFT's largest difference from itself"]) < bench.PEFT_BOUND
    same = "largest difference where PEFT gives the same again"
    assert float(found[same]) == float(found["largest difference from PEFT alone"])
    assert "met: one" in capsys.readouterr().out
