# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters in passes: the formula, the proof, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hullkit.language_model.fused_functions import FusedFunctions
from hullkit.language_model.fused_modules import stand_ins
from hullkit.language_model.interface import without_cache
from hullkit.language_model.low_rank import LowRank, add_low_rank_
from hullkit.language_model.products import share
from hullkit.language_model.proofs import proof
from torch import Tensor, nn

peft = pytest.importorskip("peft", reason="an extra is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []  # there they run on it
NAME = "peft.tuners.lora.layer.Linear.forward"


def adapted(**options: Any) -> Any:
    """A model of two linear layers with adapters, none of them zero."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24, bias=False))
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["0", "2"]}
    model = peft.get_peft_model(plain, peft.LoraConfig(**settings | options)).eval().to(DEVICE)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "base_layer")]


def gradients(model: nn.Module, x: Tensor, run: Callable[..., Tensor]) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = run(x)
    y.backward(torch.ones_like(y) / 3)
    found = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    assert all(g is not None for g in (*found, x.grad))
    return [y.detach(), x.grad, *found]  # type: ignore[list-item]


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def results(
    inputs: list[Tensor], wanted: list[bool], run: Callable[..., Tensor]
) -> list[Tensor | None]:
    """The result, and the gradients of the inputs for which they are wanted."""
    for tensor, want in zip(inputs, wanted, strict=True):
        tensor.requires_grad_(want)
    result = run(*inputs)
    result.backward(random(*result.shape, dtype=torch.float64, seed=9).to(result.dtype))
    return [result.detach(), *(tensor.grad for tensor in inputs)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", [None, "triton"])
@pytest.mark.parametrize(
    ("slots", "rows", "columns", "wide", "rank"),
    [(0, 1, 9, 5, 1), (0, 45, 300, 24, 4), (2, 33, 70, 260, 16), (3, 7, 129, 40, 20)],
)
@pytest.mark.parametrize("frozen", [None, 1, 2])  # the place of an input without a gradient
def test_the_formula(
    slots: int,
    rows: int,
    columns: int,
    wide: int,
    rank: int,
    frozen: int | None,
    backend: str | None,
    dtype: torch.dtype,
) -> None:
    first, own = ([slots], [slots]) if slots else ([1], [])
    inputs = [
        random(*shape, dtype=dtype, seed=seed)
        for seed, shape in enumerate(
            (
                [*first, rows, wide],
                [*first, rows, columns],
                [*own, rank, columns],
                [*own, wide, rank],
            )
        )
    ]
    wanted = [place != frozen for place in range(4)]
    exact_inputs = [tensor.double() for tensor in inputs]

    def ours(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return add_low_rank_(y.clone(), *share(x, dtype), a, b, 1.5, backend)

    def exact(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return y + 1.5 * (x @ a.mT) @ b.mT

    found = results(inputs, wanted, ours)
    for mine, theirs in zip(found, results(exact_inputs, wanted, exact), strict=True):
        if theirs is None:
            assert mine is None
            continue
        assert mine is not None
        # A product of rounded products; sums are in float32, and the largest terms do not cancel.
        unit = torch.finfo(dtype).eps * float(theirs.abs().max())
        assert float((mine.double() - theirs).abs().max()) <= 8.0 * unit


@pytest.mark.parametrize("backend", [None, "triton"])
def test_factors_that_are_transposed_views(backend: str | None) -> None:
    dtype = torch.float32
    y, x, a, b = (
        random(*s, dtype=dtype, seed=1) for s in ((1, 40, 8), (1, 40, 24), (24, 4), (4, 8))
    )
    down, up = (t.t().requires_grad_() for t in (a, b))
    add_low_rank_(y.clone(), *share(x, dtype), down, up, 1.0, backend).sum().backward()
    exact = [t.double().requires_grad_() for t in (a, b)]
    (x.double() @ exact[0] @ exact[1]).sum().backward()
    for ours, theirs in zip((down, up), exact, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad.t().double(), theirs.grad, rtol=1e-5, atol=1e-5)


def test_a_second_backward_pass_gives_the_same() -> None:
    """Kernels count finished parts of a sum, and leave the count at 0."""
    y, x, a, b = (
        random(*shape, dtype=torch.float32, seed=seed).requires_grad_()
        for seed, shape in enumerate([(70, 300), (70, 24), (4, 24), (300, 4)])
    )
    result = add_low_rank_(y.clone(), *share(x, torch.float32), a, b, 1.5, "triton")
    found = []
    for _ in range(2):
        x.grad = a.grad = b.grad = None
        result.backward(torch.ones_like(result), retain_graph=True)
        found.append([tensor.grad for tensor in (x, a, b)])
    for first, second in zip(*found, strict=True):
        assert first is not None
        assert second is not None
        assert torch.equal(first, second)


def test_a_gradient_is_added_to_what_others_left() -> None:
    """Layers that share an input add up its gradient in place, whoever comes first."""
    dtype = torch.float32
    x, y, a, b = (
        random(*s, dtype=dtype, seed=1) for s in ((1, 40, 24), (1, 40, 8), (4, 24), (8, 4))
    )
    grads = []
    for backend in (None, "triton"):
        leaf = x.clone().requires_grad_()
        tensor, shared = share(leaf, dtype)
        first = add_low_rank_(y.clone(), tensor, shared, a, b, 1.0, backend)
        second = add_low_rank_(first, tensor, shared, 2 * a, b, 1.0, backend)
        second.sum().backward()
        assert leaf.grad is not None
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)
    wanted = (torch.ones(40, 8, device=DEVICE) @ b @ a * 3.0)[None]
    torch.testing.assert_close(grads[0], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_model_computes_the_same(rslora: bool) -> None:
    model = adapted(use_rslora=rslora)
    x = torch.randn(3, 5, 24, device=DEVICE)
    wanted = gradients(model, x, model)
    with stand_ins(model, backend="triton" if DEVICE.type == "cpu" else None) as names:
        found = gradients(model, x, model)
    assert NAME in names
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert all("forward" not in layer.__dict__ for layer in layers(model))


def test_the_proof_reads_the_module() -> None:
    model = adapted()
    first, _ = layers(model)
    assert proof(first) == LowRank("default", 1.5)
    first.scaling["default"] = 2.0  # within a dict
    assert proof(first) == LowRank("default", 2.0)
    model.train()  # without dropout it computes the same
    assert proof(first) == LowRank("default", 2.0)
    with model.disable_adapter():
        assert proof(first) is None
    assert proof(first) == LowRank("default", 2.0)
    model.merge_adapter()
    assert proof(first) is None
    model.unmerge_adapter()
    assert proof(first) == LowRank("default", 2.0)
    first.lora_B["default"].register_forward_hook(lambda *args: None)
    assert proof(first) is None


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"lora_bias": True, "target_modules": ["0"]}, {"lora_dropout": 0.5}],
)
def test_other_formulas_are_left_alone(options: dict[str, Any]) -> None:
    model = adapted(**options)
    model.train()
    assert all(proof(layer) is None for layer in layers(model))
    model.eval()
    dropout_is_off = "lora_dropout" in options
    assert all((proof(layer) is not None) == dropout_is_off for layer in layers(model))


def test_two_adapters_and_changed_classes_are_left_alone() -> None:
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["0"]))
    model.base_model.set_adapter(["default", "second"])
    first, second = layers(model)
    assert proof(first) is None
    assert proof(second) is not None

    class Clipped(type(second)):  # type: ignore[misc]
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(x, *args, **kwargs).clamp(-2.0, 2.0)  # type: ignore[no-any-return]

    second.__class__ = Clipped
    assert proof(second) is None


def test_calls_that_do_not_fit_take_their_own_way() -> None:
    model = adapted().double()  # kernels take no float64
    x = torch.randn(3, 24, device=DEVICE, dtype=torch.float64)
    wanted = gradients(model, x, model)
    with stand_ins(model, backend="triton" if DEVICE.type == "cpu" else None):
        found = gradients(model, x, model)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)
    functions = FusedFunctions(backend="triton")
    layer = layers(adapted())[0]
    layer.lora_B["default"].double()
    assert functions.low_rank(layer, LowRank("default", 1.0), x.float()) is NotImplemented


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_passes_of_adapters_keep_no_keys_and_values() -> None:
    """PEFT's models hand the option on; learned prefixes are keys and values themselves."""
    transformers = pytest.importorskip("transformers", reason="an extra is not installed")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **sizes)

    def model() -> Any:
        return transformers.LlamaForCausalLM(config)

    none = {"use_cache": False}
    assert without_cache(model()) == none
    assert without_cache(nn.Linear(2, 2)) == {}
    for kind in (None, "CAUSAL_LM"):
        lora = peft.LoraConfig(task_type=kind, target_modules="all-linear")
        assert without_cache(peft.get_peft_model(model(), lora)) == none
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert without_cache(peft.get_peft_model(model(), prefix)) == {}


def test_the_proof_on_any_default_device() -> None:
    (layer, _) = layers(adapted())
    with torch.device("meta"):
        assert proof(layer) == LowRank("default", 1.5)
