# SPDX-License-Identifier: Apache-2.0
"""Finetuning in code of HullFT's shape: once as it is, once on hullkit, the same weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import _models
import pytest
import torch
from _hullft import module
from hullkit.interop import hullft
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token a byte."""
    folder = Path(__file__).parents[2] / "bench" / "assets" / "pybytes"
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


def test_batches_of_a_model_with_frozen_integers(tokenizer: Any) -> None:
    """As layers of 4 and 8 bits have."""
    model = _model("gpt2")
    model.codes = torch.nn.Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False)
    frozen = next(model.parameters()).requires_grad_(False)
    before, others = frozen.clone(), _models.state(model)
    hullft.finetune_on_texts(model, tokenizer, TEXTS, batch_size=2, max_length=24)
    assert torch.equal(frozen, before)
    assert any(not torch.equal(others[name], now) for name, now in model.state_dict().items())


def test_one_text_is_no_sequence_of_texts(tokenizer: Any) -> None:
    with pytest.raises(TypeError, match="texts: expected a sequence of texts, got a str"):
        hullft.finetune_on_texts(_model("gpt2"), tokenizer, TEXTS[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_batches_in_half_precision(tokenizer: Any, dtype: torch.dtype) -> None:
    """Updates below the weights' last digit move them, on average, as they move float32's."""
    moved: dict[torch.dtype, torch.Tensor] = {}
    for kind in (torch.float32, dtype):
        model = _model("llama").to(kind)
        before = _models.state(model)
        hullft.finetune_on_texts(model, tokenizer, TEXTS, batch_size=2, max_length=24, lr=2e-5)
        after = model.state_dict()
        assert {tensor.dtype for tensor in after.values()} == {kind}
        assert all(p.grad is None for p in model.parameters())
        apart = [(after[name].double() - before[name].double()).flatten() for name in after]
        moved[kind] = torch.cat(apart)
        model.model.norm.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            hullft.finetune_on_texts(model, tokenizer, TEXTS, batch_size=2, max_length=24)
        assert {p.dtype for p in model.parameters()} == {kind}
    wanted = moved[torch.float32]
    assert 0.85 < float(moved[dtype] @ wanted / wanted.square().sum()) < 1.15


def test_a_tokenizer_without_a_pad_token(tokenizer: Any) -> None:
    """It finetunes as with one wherever no text is shorter than its neighbours in a batch."""
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    assert tokenizer.pad_token is not None
    equal = ["def f(x):", "def g(x):", "return x", "return y"]
    for method, texts, size in (
        ("standard", TEXTS, 1),
        ("gradient_refresh", TEXTS, 1),
        ("standard", equal, 2),
        ("standard", ["a longer text", "another long text"], 2),  # cut to one length
    ):
        adapted = []
        for used in (tokenizer, bare):
            model = _model("llama")
            hullft.finetune_with_approach(
                model, used, texts, {"method": method}, size, max_length=9, lr=1e-3, device="cpu"
            )
            adapted.append(model.state_dict())
        assert all(torch.equal(adapted[0][name], adapted[1][name]) for name in adapted[0])
    model = _model("llama")
    before = _models.state(model)
    with pytest.raises(ValueError, match="tokenizer: expected a pad_token for a batch"):
        hullft.finetune_on_texts(model, bare, TEXTS, batch_size=3, device="cpu")
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


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

    def finetune(texts: list[str], config: Any, **options: Any) -> Any:
        return hullft.finetune_with_approach(
            model, tokenizer, texts, config, device="cpu", **options
        )

    with pytest.raises(ValueError, match=r"approach_config\['method'\]: expected one of 'standard"):
        finetune(TEXTS, {"method": "gradient"})
    for config in (None, {"method": "gradient_refresh"}):
        with pytest.raises(ValueError, match="texts: expected at least 2 tokens each, got 'x'"):
            finetune(["long enough", "x"], config)
        assert finetune([], config)["finetune_steps"] == 0
        for options, message in (
            ({"batch_size": 0}, "batch_size: expected an int >= 1, got 0"),
            ({"batch_size": -1}, "batch_size: expected an int >= 1, got -1"),
            ({"max_length": -1}, "max_length: expected an int >= 2, got -1"),
            ({"max_length": 1}, "max_length: expected an int >= 2, got 1"),
        ):
            with pytest.raises(ValueError, match=message):
                finetune(TEXTS, config, **options)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
