# SPDX-License-Identifier: Apache-2.0
"""The demo end to end on a small text, its messages, and the committed language model."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

pytest.importorskip("faiss", reason="the demo's extra is not installed")

DEMO = Path(__file__).resolve().parents[2] / "bench" / "demo"
MODULES = ("run", "corpus", "embedding", "figures", "language_model", "methods", "report")
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
WORDS += ["iota", "kappa", "lambda", "mu", "nu", "xi", "omicron", "pi"]


@pytest.fixture(scope="module")
def demo() -> Any:
    """bench/demo/run.py as a module; it is a script, so its neighbours are top-level modules."""
    shadowed = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    sys.path.insert(0, str(DEMO))
    import run

    yield run
    sys.path.remove(str(DEMO))
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.modules.update(shadowed)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty files of alike but not equal functions."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(20):
        functions = [
            f"def {WORDS[(i + j) % 16]}_{i}({WORDS[j % 16]}, {WORDS[(i * j) % 16]}):\n"
            f"    # step {i * 31 + j} of {WORDS[(3 * i + j) % 16]}\n"
            f"    total = {WORDS[j % 16]} * {i + j} + {WORDS[(i * j) % 16]}\n"
            f"    return total - {i * j}\n\n"
            for j in range(10)
        ]
        (folder / f"module_{i}.py").write_text("".join(functions))
    return folder


def test_two_queries_end_to_end(
    demo: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    torch.set_num_threads(1)  # two that spin on one shared core take minutes
    loaded: list[Any] = []
    before: list[torch.Tensor] = []
    load = demo.language_model.load

    def remembered(*args: Any) -> Any:
        loaded.append(load(*args))
        before.extend(p.detach().clone() for p in loaded[0].model.parameters())
        return loaded[0]

    monkeypatch.setattr(demo.language_model, "load", remembered)
    arguments = ["--text", str(text), "--out", str(tmp_path / "out")]
    result = demo.main([*arguments, "--queries", "2", "--updates", "4", "--refresh-interval", "2"])

    methods = demo.methods
    names = [mean.method for mean in result.means]
    assert names == [
        methods.BASE,
        methods.KNN,
        methods.KNN_TWICE,
        methods.HULL_PLAIN,
        methods.HULL,
        methods.KNN_SAME_PASSES,
        methods.KNN_TWICE_SAME_PASSES,
    ]
    assert len(result.outcomes) == 2
    for outcomes in result.outcomes:
        base, knn, twice, plain, hull, same, twice_same = outcomes
        assert all(math.isfinite(o.bpb) and o.bpb > 0 for o in outcomes)
        assert (base.updates, base.passes) == (0, 0)
        assert (knn.distinct, knn.updates, knn.passes) == (4, 4, 4)
        assert (twice.distinct, twice.updates, twice.passes) == (2, 4, 2)
        assert (plain.updates, plain.passes) == (4, 4)
        assert plain.distinct == hull.distinct <= hull.passes <= hull.updates == 4
        assert (same.updates, same.passes) == (hull.passes, hull.passes)
        assert (twice_same.updates, twice_same.passes) == (2 * hull.passes, hull.passes)
        assert all(o.finetune_seconds > 0 and o.select_seconds > 0 for o in outcomes[1:])
        assert hull.bpb < base.bpb
    for picture in result.pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
    after = loaded[0].model.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    printed = capsys.readouterr().out
    assert "hull with reuse" in printed
    assert "float32 weights" in printed
    assert all(parameter.dtype == torch.float32 for parameter in before)
    assert "Why the hull can lose" in printed


@pytest.fixture(scope="module")
def tiny_model(demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The own tokenizer with a model of a few thousand weights, stored in float32."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo.language_model.OWN_MODEL).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_of_the_weights(
    demo: Any,
    text: Path,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
) -> None:
    """Finetuned and scored are weights of the dtype asked for, which the table names."""
    seen = []
    score = demo.methods.hullkit.bits_per_byte

    def remembered(model: Any, *args: Any) -> float:
        seen.append({p.dtype for p in model.parameters()})
        return float(score(model, *args))

    monkeypatch.setattr(demo.methods.hullkit, "bits_per_byte", remembered)
    torch.set_num_threads(1)
    arguments = ["--text", str(text), "--model", str(tiny_model), "--out", str(tmp_path)]
    arguments += ["--queries", "1", "--updates", "2", "--lr", "0.01"]
    result = demo.main([*arguments, "--dtype", dtype])
    assert seen
    assert all(dtypes == {getattr(torch, dtype)} for dtypes in seen)
    base, *others = result.means
    assert all(math.isfinite(mean.bpb) and mean.bpb != base.bpb for mean in others)
    assert f"{dtype} weights" in capsys.readouterr().out


def test_pool_and_queries_share_no_file(demo: Any, text: Path) -> None:
    split = demo.corpus.split(demo.corpus.read_chunks(text), 2)
    assert not {c.file for c in split.pool} & {c.file for c in split.queries}
    assert all(len(c.text.encode()) <= demo.corpus.CHUNK_BYTES for c in split.pool)


def test_near_copies_are_no_queries(demo: Any, text: Path) -> None:
    files = demo.corpus.read_chunks(text)
    original = next(iter(files.values()))
    copies = {f"copy_{i}": [c._replace(file=f"copy_{i}") for c in original] for i in range(20)}
    with pytest.raises(ValueError, match=r"--queries: expected at most 0"):
        demo.corpus.split(copies, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--queries", "0"], "--queries: expected an integer >= 1, got 0"),
        (["--updates", "-3"], "--updates: expected an integer >= 1, got -3"),
        (["--refresh-interval", "0"], "--refresh-interval: expected an integer >= 1, got 0"),
        (["--lr", "0"], "--lr: expected a learning rate in (0, 1), got 0"),
        (["--text", "nowhere"], "--text: expected a folder, got 'nowhere'"),
        (["--dtype", "float64"], "argument --dtype: invalid choice: 'float64'"),
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
        ([*one, "--updates", "999"], "--updates: expected at most"),
        (["--text", str(tmp_path / "empty")], "--text: expected text files"),
        ([*one, "--model", str(tmp_path / "empty")], "--model: expected a folder or Hub name"),
    ):
        with pytest.raises(SystemExit, match=message):
            demo.main(arguments)


def test_language_model_scores_standard_library_below_two_bits(demo: Any) -> None:
    import argparse

    import hullkit

    lm = demo.language_model.load(str(demo.language_model.OWN_MODEL), torch.device("cpu"))
    source = Path(argparse.__file__).read_text(encoding="utf-8")[20_000:21_000]
    tokens = demo.language_model.encode(lm.tokenizer, source)
    assert tokens.ids.tolist() == list(source.encode())  # a token's id is its byte
    assert tokens.scored_bytes == len(source.encode()) - 1
    assert hullkit.bits_per_byte(lm.model, tokens.ids, tokens.scored_bytes) < 1.5
