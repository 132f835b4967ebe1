# SPDX-License-Identifier: Apache-2.0
"""bench/ops/model_sizes.py on tiny versions of its shapes, and the sizes of the whole ones."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("rich", reason="the demo's extra is not installed")
pytest.importorskip("peft", reason="the test extra is not installed")

ROOT = Path(__file__).resolve().parents[2]
# As published.
PARAMETERS = {
    "gpt2": 124_439_808,
    "smollm2": 134_515_008,
    "qwen-0.5b": 494_032_768,
    "llama-1b": 1_235_814_400,
    "gemma-2b": 2_614_341_888,
    "llama-3b": 3_212_749_824,
    "phi-3-mini": 3_821_079_552,
    "mistral-7b": 7_241_732_096,
}


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT))
    from bench.ops import model_sizes

    yield model_sizes
    sys.path.remove(str(ROOT))


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_shapes_are_the_published_ones(bench: Any, name: str) -> None:
    assert bench.SHAPES.keys() == PARAMETERS.keys()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(bench.SHAPES[name].config())
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_a_query_has_50_updates_of_30_gradients(bench: Any) -> None:
    assert (sum(bench.COUNTS), len(bench.COUNTS), max(bench.COUNTS)) == (50, 30, 2)


# PEFT asks transformers by a name that transformers has since deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_rows(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    """Every case, and models that differ in their linear layers."""
    out = tmp_path / "rows.csv"
    options = ["--device", "cpu", "--shrink", "256", "--tokens", "4", "--rounds", "1"]
    models = "gpt2,gemma-2b,phi-3-mini"
    few = [*options, "--models", models, "--cases", "lora-bfloat16,float32-host"]
    results = bench.main([*few, "--out", str(out), "--label", "this build"])
    results += bench.main([*options, "--models", "llama-1b", "--out", str(out)])
    assert len(results) == 6 + 4
    assert all(found.path == "eager: device cpu" for found in results)
    assert all(found.first > 0 and len(found.times) == 1 for found in results)
    rows = read(out)
    assert [row["unit"] for row in rows] == ["ms", "s"] * 10
    assert all(float(row["p50"]) > 0 for row in rows)
    assert rows[0]["provider"] == ("this build, all, bf16 passes, host snapshot, eager: device cpu")
    assert rows[2]["provider"].startswith("this build, LoRA r=16, default passes, device snapshot")
    assert (rows[0]["dtype"], rows[2]["dtype"]) == ("float32", "bfloat16")
    assert "Phi-3-mini 3.8B / 256" in capsys.readouterr().out


def test_what_does_not_fit_is_a_row(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("something\nelse")]

    def build(*_: Any) -> Any:
        raise errors.pop(0)

    monkeypatch.setattr(bench, "build", build)
    out = tmp_path / "rows.csv"
    options = ["--device", "cpu", "--models", "gpt2", "--cases", "float32,bfloat16"]
    results = bench.main([*options, "--out", str(out)])
    assert [found.path for found in results] == [
        "out of memory",
        "failed: RuntimeError: something",
    ]
    rows = read(out)
    assert [(row["p50"], row["rounds"]) for row in rows] == [("", "0")] * 2
    assert rows[0]["provider"].endswith("out of memory")
    assert not bench.main([*options, "--seconds", "0"])
    assert "left out, 0 s are over" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "gpt2,gpt3"], "--models: expected some of gpt2,"),
        (["--cases", "float64"], "--cases: expected some of float32,"),
        (["--shrink", "0"], "--shrink: expected an integer >= 1, got '0'"),
        (["--tokens", "1"], "--tokens: expected at least 2, got 1"),
    ],
)
def test_bad_options(
    bench: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert message in capsys.readouterr().err
