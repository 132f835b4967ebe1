"""hullkit in code of HullFT's shape: once as it is, once patched, the same answers."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _models
import numpy as np
import pytest
import torch
from hullkit import reference
from hullkit.interop import hullft
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

PACKAGE = "hullft_shaped"
MODULES = ("selector", "fill", "finetune", "runner", "evaluation")


@pytest.fixture
def package() -> Iterator[Any]:
    """Freshly imported, as the package of somebody else; forgotten afterwards."""
    yield importlib.import_module(PACKAGE)
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


@pytest.fixture
def patched(package: Any) -> Iterator[Any]:
    hullft.patch(package)
    yield package
    hullft.unpatch()


def module(name: str) -> Any:
    return importlib.import_module(f"{PACKAGE}.{name}")


def problem(seed: int, n: int = 60, d: int = 24, queries: int | None = None) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    topics = rng.normal(size=(6, d))
    pool = topics[rng.integers(6, size=n)] + 0.7 * rng.normal(size=(n, d))
    query = topics[0] + 0.5 * rng.normal(size=d if queries is None else (queries, d))
    return pool / np.linalg.norm(pool, axis=1, keepdims=True), query / np.linalg.norm(query)


FILLS = [None, "integerization", "pad_by_weights"]


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_selections(package: Any, fill: str | None, dtype: Any) -> None:
    run = module("runner").run_selection
    cases = []
    for seed in range(12):
        pool, query = problem(seed, queries=3 if seed % 3 == 0 else None)
        pool, query = pool.astype(dtype), query.astype(dtype)
        pool.flags.writeable = False
        for n_select in (1, 2, 7, 50):
            options = [{}, {"max_iter": 250, "tol": 1e-5}, {"tol": 0.5}][seed % 3]
            cases.append((pool, query, n_select, fill, options))
    naive = [run(*case, **options) for *case, options in cases]
    hullft.patch(package)
    try:
        ours = [run(*case, **options) for *case, options in cases]
    finally:
        hullft.unpatch()
    for (indices, weights), (wanted, wanted_weights) in zip(ours, naive, strict=True):
        assert np.array_equal(indices, wanted)
        assert indices.dtype == np.int64
        assert weights.dtype == np.float64
        assert np.allclose(
            weights, wanted_weights, rtol=0, atol=1e-12 if dtype is np.float64 else 1e-5
        )


def test_kernels_answer(patched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No oracle is left behind the patched names."""
    for name in ("frank_wolfe", "round_multiplicities", "apportion"):
        monkeypatch.delattr(f"hullkit.reference.{name}")
    pool, query = problem(0)
    for fill in FILLS:
        module("runner").run_selection(pool, query, 9, fill)


def test_embeddings_of_other_types() -> None:
    pool, query = problem(3)
    selector = hullft.FWSelector(max_iter=50)
    assert selector.name == "fw"
    half, integer = pool.astype(np.float16), np.rint(100 * pool).astype(np.int32)
    for array, wide in ((half, half.astype(np.float32)), (integer, integer.astype(np.float64))):
        ours = selector.select(array, query, 9)
        wanted = selector.select(wide, query.astype(wide.dtype), 9)
        assert all(map(np.array_equal, ours, wanted))


def test_exchange_passes() -> None:
    """Over half of these change in the first pass, and some in the second."""
    passes = [-1, 0, 1, 2]
    found: dict[int, list[list[int]]] = {number: [] for number in passes}
    for seed in range(20):
        pool, query = problem(seed, n=12, d=8)
        weights = np.random.default_rng(seed).dirichlet(np.ones(12))
        for number in passes:
            ours, _ = hullft.integerize_by_geometry(np.arange(12), weights, pool, query, 30, number)
            counts = np.bincount(ours, minlength=12).tolist()
            wanted = reference.round_multiplicities(pool, query, weights, 30, max(0, number))
            assert counts == wanted.tolist()
            found[number].append(counts)
    assert found[-1] == found[0]
    assert sum(a != b for a, b in zip(found[0], found[1], strict=True)) > 10
    assert found[1] != found[2]


def test_filling_at_the_edges() -> None:
    indices, weights = np.array([4, 2, 9], dtype=np.int32), np.array([0.5, 0.3, 0.2])
    points = np.eye(3)
    for n_select in (0, -1):
        expanded = hullft.integerize_by_geometry(indices, weights, points, points[0], n_select)
        assert [len(part) for part in expanded] == [0, 0]
    empty = hullft.integerize_by_geometry(indices[:0], weights[:0], points[:0], points[0], 5)
    assert [len(part) for part in empty] == [0, 0]
    one, share = hullft.integerize_by_geometry([7], [0.4], points[:1], points[:1], 3)
    assert one.tolist() == [7, 7, 7]
    assert np.array_equal(share, np.full(3, 1 / 3))

    pad = hullft.pad_by_weights_deterministic
    cut, kept = pad(indices, weights, 2)
    assert (cut.tolist(), kept.tolist(), cut.dtype) == ([4, 2], [0.5, 0.3], np.int32)
    cut[0] = 0
    assert indices[0] == 4
    assert pad(indices, np.array([0.5, -0.5, 0.5]), 6)[0].tolist() == [4, 4, 4, 9, 9, 9]
    assert pad(indices, np.zeros(3), 6)[0].tolist() == [4, 4, 2, 2, 9, 9]
    padded, their_weights = pad(indices, 2 * weights, 10)
    assert padded.tolist() == [4] * 5 + [2] * 3 + [9] * 2
    assert np.allclose(their_weights, [0.5] * 5 + [0.3] * 3 + [0.2] * 2)
    assert [len(part) for part in pad(indices[:0], weights[:0], 5)] == [0, 0]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token a byte."""
    folder = Path(__file__).parents[1] / "bench" / "assets" / "pybytes"
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _model(kind: str) -> Any:
    """No dropout: there the published code, which leaves it on, and ours agree."""
    torch.manual_seed(5)
    sizes = dict(vocab_size=256, num_hidden_layers=2, num_attention_heads=2)
    if kind == "llama":
        config = LlamaConfig(hidden_size=16, intermediate_size=24, **sizes)
        return LlamaForCausalLM(config).double()
    config = GPT2Config(
        vocab_size=256, n_positions=64, n_embd=16, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double()


TEXTS = ["def f(x):", "def f(x):", "return x", "def f(x):", "return x + 1", "return x", "return x"]
UNIQUE = {"standard": 3, "gradient_refresh": 3, "sift_global_refresh": 3}
UNIQUE["sift_consecutive_refresh"] = 5


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "approach",
    [
        {"method": "standard"},
        {"method": "gradient_refresh"},
        {"method": "gradient_refresh", "refresh_interval": 1},
        {"method": "gradient_refresh", "refresh_interval": 3, "other": "key"},
        {"method": "sift_global_refresh", "refresh_interval": 2, "refresh_intervals": [1, 2]},
        {"method": "sift_consecutive_refresh", "refresh_interval": 2},
    ],
    ids=lambda approach: f"{approach['method']}-{approach.get('refresh_interval')}",
)
def test_finetuned_weights(
    package: Any, tokenizer: Any, kind: str, approach: dict[str, Any]
) -> None:
    evaluate, model = module("evaluation").evaluate, _model(kind)
    before = _models.state(model)
    options = dict(max_length=24, lr=1e-3)
    naive = evaluate(model, tokenizer, TEXTS, "def g(y):", approach, **options)
    hullft.patch(package)
    try:
        ours = evaluate(model, tokenizer, TEXTS, "def g(y):", approach, device="cpu", **options)
    finally:
        hullft.unpatch()
    method = approach["method"]
    moved = 0.0
    for name, tensor in naive["adapted"].items():
        torch.testing.assert_close(ours["adapted"][name], tensor, rtol=0, atol=1e-9)
        moved = max(moved, (tensor - before[name]).abs().max().item())
        assert torch.equal(model.state_dict()[name], before[name])  # the caller's doing
    assert moved > 1e-3
    assert ours["loss"] == pytest.approx(naive["loss"], abs=1e-9)
    assert not ours["training"]
    assert ours["finetune_seconds"] > 0
    facts = {key: value for key, value in ours.items() if key.startswith("finetune")}
    del facts["finetune_seconds"]
    assert facts == {
        "finetune_steps": 7,
        "finetune_approach": method,
        "finetune_unique_texts": UNIQUE[method],
        "finetune_total_texts": 7,
    }
    assert {key: value for key, value in naive.items() if key in facts}.items() <= facts.items()


def test_batches_and_truncation(tokenizer: Any) -> None:
    """Several texts of different lengths a pass, all of them cut."""
    texts, options = [*TEXTS[:3], "a much longer text than that"], dict(max_length=9, lr=1e-3)
    adapted = []
    for function in (module("finetune").finetune_on_texts, hullft.finetune_on_texts):
        model = _model("gpt2")
        report = function(model, tokenizer, texts, batch_size=3, **options)
        assert report.keys() == {"finetune_steps", "finetune_seconds"}
        assert report["finetune_steps"] == 2
        adapted.append(model.state_dict())
    for name, tensor in adapted[0].items():
        torch.testing.assert_close(adapted[1][name], tensor, rtol=0, atol=1e-9)


def test_only_what_requires_a_gradient(tokenizer: Any) -> None:
    """Frozen parameters stay, gradients left behind by the caller do not count."""
    adapted = []
    for left_behind in (False, True):
        model = _model("llama")
        model.model.embed_tokens.weight.requires_grad_(False)
        if left_behind:
            model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
        before = _models.state(model)
        hullft.finetune_with_approach(model, tokenizer, TEXTS[:1], None, lr=1e-2, device="cpu")
        assert all(p.grad is None for p in model.parameters())
        adapted.append(model.state_dict())
        moved = {name for name in before if not torch.equal(adapted[-1][name], before[name])}
        assert moved == before.keys() - {"model.embed_tokens.weight"}
    assert all(torch.equal(adapted[0][name], adapted[1][name]) for name in adapted[0])


def test_no_dropout(tokenizer: Any) -> None:
    adapted = []
    for p in (0.0, 0.5):
        model = _model("gpt2").train()
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = p
        hullft.finetune_with_approach(model, tokenizer, TEXTS[:2], None, lr=1e-2, device="cpu")
        assert not any(part.training for part in model.modules())
        adapted.append(model.state_dict())
    assert all(torch.equal(adapted[0][name], adapted[1][name]) for name in adapted[0])


@pytest.mark.gpu
def test_on_a_device(tokenizer: Any) -> None:
    """device=None goes to the GPU, and stays there."""
    approach, adapted = {"method": "gradient_refresh"}, []
    for device in ("cpu", None):
        model = _model("llama")
        report = hullft.finetune_with_approach(
            model, tokenizer, TEXTS, approach, lr=1e-3, device=device
        )
        assert report["finetune_steps"] == 7
        assert {p.device.type for p in model.parameters()} == {device or "cuda"}
        adapted.append(model.cpu().state_dict())
    for name, tensor in adapted[0].items():
        # The model takes its loss in float32, whatever its dtype: rounded otherwise there.
        torch.testing.assert_close(adapted[1][name], tensor, rtol=0, atol=1e-5)


def test_finetuning_refusals(tokenizer: Any) -> None:
    model = _model("llama")
    before = _models.state(model)

    def finetune(texts: list[str], config: Any) -> Any:
        return hullft.finetune_with_approach(model, tokenizer, texts, config, device="cpu")

    with pytest.raises(ValueError, match=r"approach_config\['method'\]: expected one of 'standard"):
        finetune(TEXTS, {"method": "gradient"})
    for config in (None, {"method": "gradient_refresh"}):
        with pytest.raises(ValueError, match="texts: expected at least 2 tokens each, got 'x'"):
            finetune(["long enough", "x"], config)
        assert finetune([], config)["finetune_steps"] == 0
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def names_of(package: Any) -> dict[tuple[str, str], Any]:
    """Every binding in the package's modules, the entries of the registry among them."""
    found = {}
    for name in MODULES:
        for key, value in vars(module(name)).items():
            found[name, key] = value
            if key == "_SELECTORS":
                found |= {(key, entry): selector for entry, selector in value.items()}
    return found


def test_patching(package: Any) -> None:
    before = names_of(package)
    hullft.patch(package)
    after = names_of(package)
    changed = {place: after[place] for place in before if after[place] is not before[place]}
    hullft.unpatch()
    assert changed == {
        ("selector", "FWSelector"): hullft.FWSelector,
        ("_SELECTORS", "fw"): hullft.FWSelector,
        ("fill", "integerize_by_geometry"): hullft.integerize_by_geometry,
        ("runner", "integerize_by_geometry"): hullft.integerize_by_geometry,
        ("fill", "pad_by_weights_deterministic"): hullft.pad_by_weights_deterministic,
        ("runner", "pad_by_weights_deterministic"): hullft.pad_by_weights_deterministic,
        ("finetune", "finetune_on_texts"): hullft.finetune_on_texts,
        ("evaluation", "finetune_on_texts"): hullft.finetune_on_texts,
        ("finetune", "finetune_with_approach"): hullft.finetune_with_approach,
        ("evaluation", "finetune_with_approach"): hullft.finetune_with_approach,
    }
    restored = names_of(package)
    assert restored.keys() == before.keys()
    assert all(restored[place] is before[place] for place in before)


def test_names_of_the_package_itself(package: Any) -> None:
    original = package.Chosen = module("selector").FWSelector
    hullft.patch(package)
    assert package.Chosen is hullft.FWSelector
    hullft.unpatch()
    assert package.Chosen is original


def test_modules_imported_while_patched(package: Any) -> None:
    hullft.patch(PACKAGE)
    assert module("runner").integerize_by_geometry is hullft.integerize_by_geometry
    hullft.unpatch()
    assert module("runner").integerize_by_geometry is module("fill").integerize_by_geometry
    assert module("fill").integerize_by_geometry is not hullft.integerize_by_geometry


def test_what_others_bound_stays(package: Any) -> None:
    """Bindings to ours from before, and bindings made over ours since."""
    module("evaluation").integerize_by_geometry = hullft.integerize_by_geometry
    runner = module("runner")
    hullft.patch(package)
    runner.pad_by_weights_deterministic = None
    hullft.unpatch()
    assert module("evaluation").integerize_by_geometry is hullft.integerize_by_geometry
    assert runner.pad_by_weights_deterministic is None


def test_patching_refusals(package: Any) -> None:
    with pytest.raises(RuntimeError, match="unpatch: expected a patched package, got none"):
        hullft.unpatch()
    module("evaluation")  # which imports the name
    del module("finetune").finetune_on_texts
    before = names_of(package)
    with pytest.raises(
        AttributeError, match=rf"package: expected {PACKAGE}\.finetune\.finetune_on_texts, got none"
    ):
        hullft.patch(package)
    assert all(names_of(package)[place] is before[place] for place in before)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        hullft.patch("no_such_package")


def test_one_patch_at_a_time(patched: Any) -> None:
    with pytest.raises(
        RuntimeError, match=f"patch: expected no patched package, got {PACKAGE} patched"
    ):
        hullft.patch(patched)
