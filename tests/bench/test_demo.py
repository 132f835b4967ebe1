# SPDX-License-Identifier: Apache-2.0
"""The demo end to end on a small text, its messages, and the committed language model."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

pytest.importorskip("matplotlib", reason="the demo's extra is not installed")

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
WORDS += ["iota", "kappa", "lambda", "mu", "nu", "xi", "omicron", "pi"]


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT))
    import bench.demo.__main__
    import bench.harness.texts

    yield bench
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def demo(bench: Any) -> Any:
    return bench.demo.__main__


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's works: forty files, of several kinds, of alike but not equal functions."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        functions = [
            f"def {WORDS[(i + j) % 16]}_{i}({WORDS[j % 16]}, {WORDS[(i * j) % 16]}):\n"
            f"    # step {i * 31 + j} of {WORDS[(3 * i + j) % 16]}\n"
            f"    total = {WORDS[j % 16]} * {i + j} + {WORDS[(i * j) % 16]}\n"
            f"    return total - {i * j}\n\n"
            for j in range(10)
        ]
        inner = folder / ("papers" if i % 2 else "code")
        inner.mkdir(exist_ok=True)
        suffix = ("py", "md", "txt", "tex")[i % 4]
        (inner / f"work_{i}.{suffix}").write_text("".join(functions))
    (folder / "picture.png").write_bytes(b"\x89PNG\xff")
    return folder


@pytest.fixture(scope="module")
def tiny_model(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The own tokenizer with a model of a few thousand weights, stored in float32."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(bench.harness.texts.OWN_MODEL).save_pretrained(folder)
    return folder


def test_the_story_of_a_folder_of_works(
    demo: Any,
    text: Path,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The model is small, and has the name by which bench/results knows rates."""
    torch.set_num_threads(1)  # two that spin on one shared core take minutes
    known = tmp_path / demo.texts.OWN_MODEL.name
    shutil.copytree(tiny_model, known)
    options = ["--text", str(text), "--model", str(known), "--out", str(tmp_path / "out")]
    result = demo.main([*options, "--queries", "2"])

    runs = {(row["path"], row["rule"], row["lr"]) for row in result.rows}
    # The published settings on both ways, and the rules at the rates of bench/results.
    assert {("published", "hull", 5e-5), ("float32", "hull", 5e-5)} <= runs
    cells = demo.rates.measured(known.name, "float32", demo.RULES, [3])
    assert len(cells) == len(demo.RULES)
    assert {("float32", cell.rule, cell.lr) for cell in cells} <= runs
    assert {rule for path, rule, _ in runs if path == "float32"} == set(demo.RULES)
    assert len(result.rows) == 2 * len(runs) == 2 * 6
    bits = {
        (row["path"], row["rule"], row["lr"], row["query"]): float(row["bpb"])
        for row in result.rows
    }
    for query in (0, 1):  # one procedure, two implementations
        theirs, ours = (bits[path, "hull", 5e-5, query] for path in ("published", "float32"))
        assert theirs == pytest.approx(ours, rel=1e-4)
    for row in result.rows:
        assert row["passes"] <= 3
        assert math.isfinite(float(row["bpb"]))
        assert 0 < float(row["percent"]) < 100
        assert float(row["adapt_ms"]) > 0
    for picture in result.pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for words in (
        "published procedure",
        "the same in hullkit",
        "Each rule at its own best",
        "SIFT",
    ):
        assert words in printed
    assert "from kNN" in printed


def test_rates_of_another_model_are_calibrated(
    demo: Any, text: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On queries that are not judged; passes in bfloat16."""
    torch.set_num_threads(1)
    tried: dict[tuple[str, float], float] = {}
    real = demo.rates.analysis.best_rate

    def noted(rows: list[dict[str, Any]], *cell: Any) -> float:
        for row in rows:
            assert row["query"] >= 1  # query 0 is the judged one
            tried[row["rule"], row["lr"]] = 0.0
        for row in rows:
            tried[row["rule"], row["lr"]] += float(row["percent"])
        return float(real(rows, *cell))

    monkeypatch.setattr(demo.rates.analysis, "best_rate", noted)
    monkeypatch.setattr(demo, "CALIBRATION", 1)
    options = ["--text", str(text), "--model", str(tiny_model), "--out", str(tmp_path)]
    result = demo.main([*options, "--queries", "1", "--passes", "1", "--path", "bf16"])
    for rule in demo.RULES:
        best = min(
            lr
            for (name, lr), percent in tried.items()
            if name == rule and percent == min(p for (n, _), p in tried.items() if n == rule)
        )
        assert ("bf16", rule, best) in {
            (row["path"], row["rule"], row["lr"]) for row in result.rows
        }


def test_pool_and_queries_share_no_file(bench: Any, text: Path) -> None:
    split = bench.demo.corpus.split(bench.demo.corpus.read_chunks(text), 2)
    assert not {c.file for c in split.pool} & {c.file for c in split.queries}
    assert all(len(c.text.encode()) <= bench.demo.corpus.CHUNK_BYTES for c in split.pool)
    assert {Path(c.file).suffix for c in split.pool} == {".py", ".md", ".txt", ".tex"}


def test_near_copies_are_no_queries(bench: Any, text: Path) -> None:
    files = bench.demo.corpus.read_chunks(text)
    original = next(iter(files.values()))
    copies = {f"copy_{i}": [c._replace(file=f"copy_{i}") for c in original] for i in range(20)}
    with pytest.raises(ValueError, match=r"--queries: expected at most 0"):
        bench.demo.corpus.split(copies, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--queries", "0"], "--queries: expected an integer >= 1, got 0"),
        (["--passes", "3", "-3"], "--passes: expected an integer >= 1, got -3"),
        (["--text", "nowhere"], "--text: expected a folder, got 'nowhere'"),
        (["--path", "float64"], "argument --path: invalid choice: 'float64'"),
        (["--device", "toaster"], "--device: expected a usable device, got 'toaster'"),
    ],
)
def test_bad_options_are_named(
    demo: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        demo.main(arguments)
    assert message in capsys.readouterr().err


def test_bad_options_that_only_the_inputs_refute(demo: Any, text: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    one = ["--text", str(text), "--queries", "1"]
    for arguments, message in (
        (["--text", str(text), "--queries", "99"], "--queries: expected at most"),
        ([*one, "--passes", "999"], "--passes: expected at most"),
        (["--text", str(tmp_path / "empty")], "--text: expected text files"),
        ([*one, "--model", str(tmp_path / "empty")], "--model: expected a folder or Hub name"),
    ):
        with pytest.raises(SystemExit, match=message):
            demo.main(arguments)


def test_language_model_scores_standard_library_below_two_bits(bench: Any) -> None:
    import argparse

    import hullkit

    texts = bench.harness.texts
    model = texts.language_model(texts.OWN_MODEL, torch.device("cpu"))
    source = Path(argparse.__file__).read_text(encoding="utf-8")[20_000:21_000]
    tokens = texts.Tokens(texts.OWN_MODEL, None, 1024)
    ids = tokens(source)
    assert ids[1:].tolist() == list(source.encode())  # a token's id is its byte
    assert tokens.scored_bytes(ids) == len(source.encode())
    assert hullkit.bits_per_byte(model, ids, tokens.scored_bytes(ids)) < 1.5
