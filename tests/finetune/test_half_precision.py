# SPDX-License-Identifier: Apache-2.0
"""Models in bfloat16 and float16: what they keep of small updates, the same bits, and adapters."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import hullkit
import peft
import pytest
import torch
from _models import VOCABULARY, llama
from hullkit import TestTimeFinetuner
from hullkit.language_model.pass_copies import autocast_weights, narrowed_tensors
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

HALVES = [torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
COUNTS = [4, 3, 1]


def examples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in (12, 9, 20)]


def adapted(model: nn.Module, counts: list[int] = COUNTS, **options: Any) -> dict[str, Tensor]:
    with TestTimeFinetuner(model, **({"lr": 1e-3} | options)).adapted(examples(), counts) as inside:
        return {name: tensor.clone() for name, tensor in inside.state_dict().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES)
def test_same_seed_same_bits(dtype: torch.dtype, device: str) -> None:
    """Twice, after other queries and captured; other bits for another seed and rounding."""
    model = llama().to(device, dtype)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuner = TestTimeFinetuner(model, lr=1e-3)
    runs = []
    for _ in range(2):
        with tuner.adapted(examples(), COUNTS) as inside:
            runs.append({name: tensor.clone() for name, tensor in inside.state_dict().items()})
        with tuner.adapted(examples()[::-1], [1, 2, 3]):
            pass
    assert equal(*runs)
    assert equal(base, model.state_dict())
    assert equal(runs[0], adapted(model, capture=False))
    assert equal(runs[0], adapted(model, seed=0, rounding="stochastic"))
    assert not equal(runs[0], adapted(model, seed=1))
    assert not equal(runs[0], adapted(model, rounding="nearest"))
    assert {tensor.dtype for tensor in runs[0].values() if tensor.is_floating_point()} == {dtype}


@pytest.mark.parametrize("dtype", HALVES)
def test_noise_does_not_depend_on_what_else_is_trained(dtype: torch.dtype) -> None:
    """After one burst, whose gradients are the same, a parameter has the same bits alone."""
    everything = adapted(llama().to(dtype), [2, 0, 0])
    model = llama().to(dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1.mlp" in name)
    alone = adapted(model, [2, 0, 0])
    for name, tensor in alone.items():
        if "layers.1.mlp" in name:
            assert torch.equal(tensor, everything[name])


@pytest.mark.parametrize("dtype", HALVES)
def test_small_updates_are_not_lost(dtype: torch.dtype) -> None:
    """lr far below half a step of a weight: nothing moves to nearest, all of it on average else.

    Adam's first updates with one gradient move a weight by lr each. A weight of 1 is the worst.
    """
    lr, k = 1e-5, 16
    moved = {}
    for rounding in ("nearest", "stochastic"):
        model = llama().to(dtype)
        with torch.no_grad():
            model.lm_head.weight.copy_(model.lm_head.weight.sign() + (model.lm_head.weight == 0))
        before = model.lm_head.weight.detach().double().clone()
        after = adapted(model, [k, 0, 0], lr=lr, refresh_interval=k, rounding=rounding)
        moved[rounding] = (after["lm_head.weight"].double() - before).abs().mean().item()
    size = model.lm_head.weight.numel()
    step = torch.finfo(dtype).eps / 2  # just below 1
    error = 3 * math.sqrt(k * lr * 2 * step / size)
    assert moved["nearest"] == 0.0
    assert moved["stochastic"] == pytest.approx(k * lr, abs=error)


@pytest.mark.parametrize("mode", ["reuse", "accumulate"])
def test_passes_of_a_float16_model_are_not_float16(mode: str) -> None:
    model = llama().half()
    seen: set[torch.dtype] = set()
    layer = model.model.layers[0].mlp
    hook = layer.register_forward_hook(lambda _, args, out: seen.update((args[0].dtype, out.dtype)))
    adapted(model, mode=mode)
    assert seen == {torch.bfloat16}
    hook.remove()


def test_gradients_that_float16_cannot_hold() -> None:
    """Below 6e-8 everywhere under the last norm: weights there move all the same."""
    model = llama().half()
    before = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    hook = model.model.norm.register_forward_hook(
        lambda _, args, out: out.detach() + (out - out.detach()) * 1e-6
    )
    after = adapted(model, eps=1e-14)["model.layers.0.mlp.down_proj.weight"]
    hook.remove()
    assert (after != before).double().mean() > 0.9


def test_passes_read_what_updates_wrote() -> None:
    """The copies follow: the second pass of one example has a smaller loss."""
    tuner = TestTimeFinetuner(llama().half(), lr=1e-2)
    with tuner.adapted(examples(), [4, 0, 0]):
        assert tuner.last_report is not None
        first, second = tuner.last_report.losses
    assert second < first - 0.01


def test_which_tensors_passes_read_in_bfloat16() -> None:
    model = llama()
    assert narrowed_tensors(model) == []
    linear = {id(p) for n, p in model.named_parameters() if "proj" in n or n == "lm_head.weight"}
    assert {id(p) for p in autocast_weights(model)} == linear
    assert narrowed_tensors(llama().bfloat16()) == []
    half = llama().half()
    assert {id(t) for t in narrowed_tensors(half)} >= {id(p) for p in half.parameters()}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES)
def test_float32_adapters_on_a_half_precision_base(dtype: torch.dtype, device: str) -> None:
    """Thin products run in bfloat16, updates are float32's, DoRA keeps its dtype."""
    for use_dora in (False, True):
        config = peft.LoraConfig(
            r=4, target_modules=["q_proj", "down_proj"], use_dora=use_dora, task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(llama().to(dtype), config).to(device)
        factors = {n: p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n}
        assert {p.dtype for p in factors.values()} == {torch.float32}
        read = {id(tensor) for tensor in narrowed_tensors(model)}
        assert {id(p) in read for p in factors.values()} == {not use_dora}
    model = peft.get_peft_model(
        llama().to(dtype), peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    ).to(device)
    seen: set[torch.dtype] = set()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    hook = layer.lora_A["default"].register_forward_hook(
        lambda _, args, out: seen.update((args[0].dtype, out.dtype))
    )
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inside = adapted(model)
    hook.remove()
    assert seen == {torch.bfloat16}
    assert equal(base, model.state_dict())
    moved = [name for name, tensor in inside.items() if not torch.equal(tensor, base[name])]
    assert moved
    assert all("lora_" in name and inside[name].dtype is torch.float32 for name in moved)
    # More digits than bfloat16 has: updates are not made to the copies.
    assert any(not torch.equal(inside[name], inside[name].bfloat16().float()) for name in moved)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("dtype", HALVES)
def test_adapters_that_are_no_lora_keep_their_factors(dtype: torch.dtype) -> None:
    """AdaLoRA multiplies with a third factor, in float32; others may call anything use_dora."""
    config = peft.AdaLoraConfig(
        init_r=4, target_modules=["q_proj"], total_step=10, init_lora_weights=False
    )
    model = peft.get_peft_model(llama().to(dtype), config)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inside = adapted(model)
    assert equal(base, model.state_dict())
    assert any("lora_E" in name and not torch.equal(inside[name], base[name]) for name in inside)
    own: Any = llama().to(dtype)
    layer = own.model.layers[0].mlp
    layer.base_layer, layer.lora_A, layer.use_dora = nn.Identity(), nn.ModuleDict(), False
    adapted(own)


def test_a_float16_model_with_a_table_of_its_own() -> None:
    """An attribute that is no buffer; passes are in bfloat16."""

    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
            self.places = torch.randn(64, 8).half()

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.head(self.embedding(ids) + self.places[: ids.shape[1]])
            return out

    model = Placed().half()
    model.also = model.head.weight.data  # of a parameter's memory, which nobody reads here
    before, places = model.places, model.places.clone()
    assert not any(model.also is tensor for tensor in narrowed_tensors(model))
    adapted(model)
    assert model.places is before
    assert torch.equal(before, places)


def test_interrupted_passes_leave_the_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama().half()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.norm.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        adapted(model)
    hook.remove()
    assert equal(base, model.state_dict())
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    adapted(model)


def test_refusals() -> None:
    model = llama()
    with pytest.raises(ValueError, match=r"rounding: expected one of .*, got 'up'"):
        TestTimeFinetuner(model, rounding="up")
    with pytest.raises(ValueError, match="seed: expected an int in"):
        TestTimeFinetuner(model, seed=-1)
    with pytest.raises(TypeError, match="seed: expected an int"):
        TestTimeFinetuner(model, seed=1.5)  # type: ignore[arg-type]


def stdlib_texts(count: int, length: int) -> list[Tensor]:
    """Bytes of a module of the standard library: a prompt and chunks after it."""
    text = inspect.getsource(json.decoder).encode()
    return [torch.tensor(list(text[i * length : (i + 1) * length])) for i in range(count)]


def test_the_demo_model_gains_as_much_in_half_precision() -> None:
    """The embedded model, all defaults: bits per byte within what storing it in halves costs.

    The least that costs is one stochastic rounding of the weights that float32 ends with. Rounding
    after each of n bursts adds up to n times that, whether its bias or its spread decides.
    """
    folder = Path(__file__).resolve().parents[2] / "bench" / "assets" / "pybytes"
    prompt, *chosen = stdlib_texts(7, 256)
    counts = [2] * len(chosen)

    def bits(model: nn.Module) -> float:
        return hullkit.bits_per_byte(model, prompt, len(prompt) - 1)

    stored = AutoModelForCausalLM.from_pretrained(folder)
    base = bits(stored.float())
    lost: dict[torch.dtype, float] = {}
    gained: dict[torch.dtype, float] = {}
    with TestTimeFinetuner(stored, lr=1e-4).adapted(chosen, counts) as model:
        gained[torch.float32] = bits(model)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for dtype in HALVES:
        half = AutoModelForCausalLM.from_pretrained(folder).to(dtype)
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            rounded = {name: _rounded(tensor, dtype, generator) for name, tensor in weights.items()}
            half.load_state_dict(rounded)
            lost[dtype] = max(lost.get(dtype, 0.0), abs(bits(half) - gained[torch.float32]))
        half = AutoModelForCausalLM.from_pretrained(folder).to(dtype)
        with TestTimeFinetuner(half, lr=1e-4).adapted(chosen, counts) as model:
            gained[dtype] = bits(model)
        assert abs(gained[dtype] - gained[torch.float32]) <= len(chosen) * lost[dtype]
        assert base - gained[dtype] > 0.9 * (base - gained[torch.float32])


def _rounded(tensor: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """To a neighbour, with the probability of being nearer to the other."""
    if not tensor.is_floating_point():
        return tensor
    spacing = torch.finfo(dtype).eps * 2.0 ** tensor.abs().clamp(min=1e-30).log2().floor()
    return (tensor + (torch.rand(tensor.shape, generator=generator) - 0.5) * spacing).to(dtype)
