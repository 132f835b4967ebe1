# SPDX-License-Identifier: Apache-2.0
"""PEFT's layers that read one input, as one product: numbers, and whom a pass may not believe."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hullkit.language_model import adapted_layers, low_rank_layers
from hullkit.language_model.fused_modules import stand_ins
from hullkit.language_model.products import SharedInput, WeightProducts
from torch import Tensor, nn

peft = pytest.importorskip("peft", reason="an extra is not installed")

# On a GPU of compute capability 9.0 the kernel takes bfloat16; elsewhere torch multiplies.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
BACKEND = None if DEVICE.type == "cuda" else "triton"
# Of the largest number. In bfloat16 five roundings lie in a row (a product's, a sum's, and again
# where it is read), of half a unit each; in float32 sums of up to 130 terms have another order.
BOUND = 5 * 2.0**-8 if DEVICE.type == "cuda" else 1e-5
TOKENS, WIDTH, WIDE = 130, 64, 72


class Block(nn.Module):
    """Three layers that read one input, and one that reads theirs.

    between: called after the first.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(WIDTH, WIDE), nn.Linear(WIDTH, WIDE, bias=False)
        self.v, self.o = nn.Linear(WIDTH, WIDE), nn.Linear(WIDE, WIDTH)
        self.between: Any = None

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        q = self.q(x)
        if self.between is not None:
            self.between()
        k, v = self.k(x), self.v(x)
        k += 1.0  # as models do that scale queries in place
        y: Tensor = self.o(torch.sin(q) * k + v)
        return y


def adapted(**options: Any) -> Any:
    settings: dict[str, Any] = {"r": 8, "lora_alpha": 12, "target_modules": ["q", "k", "v", "o"]}
    model = peft.get_peft_model(Block(), peft.LoraConfig(**settings | options)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.to(DEVICE, DTYPE)


def block_of(model: Any) -> Block:
    [block] = [module for module in model.modules() if isinstance(module, Block)]
    return block


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, TOKENS, WIDTH, generator=generator).to(DEVICE, DTYPE).requires_grad_()


def run(model: Any, fused: bool) -> list[Tensor]:
    """The output and all gradients."""
    x = inputs()
    if fused:
        with stand_ins(model, backend=BACKEND):
            y = model(x)
            y.float().square().sum().backward()
    else:
        y = model(x)
        y.float().square().sum().backward()
    found = [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    model.zero_grad()
    return [g for g in found if g is not None]


def run_twice(model: Any, made: list[int]) -> None:
    """Two passes, which have the same bits. `made` has the calls of the second."""
    first = run(model, fused=True)
    made.clear()
    second = run(model, fused=True)
    for ours, theirs in zip(second, first, strict=True):
        assert torch.equal(ours, theirs)


def assert_near(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        error = float((ours.float() - theirs.float()).abs().max())
        assert error <= BOUND * float(theirs.float().abs().max())


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each call of `outputs` computes."""
    calls: list[int] = []
    own = low_rank_layers.outputs

    def noted(x: Tensor, shape: Any, layers: Any, *others: Any) -> Any:
        calls.append(len(layers))
        return own(x, shape, layers, *others)

    monkeypatch.setattr(adapted_layers, "outputs", noted)
    return calls


def test_readers_of_one_input_are_computed_at_once_from_the_second_pass_on(made: list[int]) -> None:
    model = adapted()
    wanted = run(model, fused=False)
    first = run(model, fused=True)
    assert made == [1, 1, 1, 1]
    assert_near(first, wanted)
    run_twice(model, made)
    assert made == [3, 1]


def test_layers_of_several_scales_and_ranks_are_computed_apart(made: list[int]) -> None:
    for options in ({"alpha_pattern": {"k": 24}}, {"rank_pattern": {"k": 16}, "lora_alpha": 8}):
        model = adapted(**options)
        wanted = run(model, fused=False)
        run(model, fused=True)
        made.clear()
        assert_near(run(model, fused=True), wanted)
        assert sorted(made) == [1, 1, 2]


def test_factors_that_lie_by_columns() -> None:
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_" in name and ".k." in name:
            parameter.data = parameter.data.t().contiguous().t()
    wanted = run(model, fused=False)
    for _ in range(2):
        assert_near(run(model, fused=True), wanted)


def test_a_factor_that_changes_after_the_first_reader(made: list[int]) -> None:
    """What was computed ahead is of the old factor. It is computed again."""
    model = adapted()
    block = block_of(model)
    run(model, fused=True)
    weight = block.k.lora_B["default"].weight  # type: ignore[union-attr, index]
    was = weight.detach().clone()

    def change() -> None:
        with torch.no_grad():
            weight.copy_(was * 2)

    block.between = change
    wanted = run(model, fused=False)
    with torch.no_grad():
        weight.copy_(was)
    made.clear()
    assert_near(run(model, fused=True), wanted)
    assert made == [3, 1, 1]


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_a_factor_that_is_replaced_after_the_first_reader(name: str) -> None:
    model = adapted()
    block = block_of(model)
    run(model, fused=True)
    part = getattr(block.k, name)["default"]
    own = part.weight
    other = nn.Parameter(own.detach() * 2)
    wanted: list[Tensor] = []
    for fused in (False, True):
        part.weight = own
        block.between = lambda: setattr(part, "weight", other)
        found = run(model, fused)
        if fused:
            assert_near(found, wanted)
        wanted = found


@pytest.mark.parametrize("node_hook", [False, True])
def test_hooks_that_update_factors_in_the_backward_pass(node_hook: bool) -> None:
    """A factor's gradient is there before its input's, which reads the factor."""
    model = adapted()
    wanted = run(model, fused=False)
    values = [p.detach().clone() for p in model.parameters()]
    nodes = []
    trained = [p for p in model.parameters() if p.requires_grad]
    handles = []
    for a, b in zip(trained[::2], trained[1::2], strict=True):  # a layer's

        def update(*_: Any, both: Any = (a, b)) -> None:
            for parameter in both:
                parameter.data.add_(1.0)

        if node_hook:  # where autograd accumulates the gradient: the older way
            function: Any = b.expand_as(b).grad_fn
            handles.append(function.next_functions[0][0].register_hook(update))
            nodes.append(function)
        else:
            handles.append(b.register_post_accumulate_grad_hook(update))
    assert_near(run(model, fused=True), wanted)
    for handle in handles:
        handle.remove()
    assert any(not torch.equal(p, was) for p, was in zip(model.parameters(), values, strict=True))


def refuse(monkeypatch: pytest.MonkeyPatch, refused: Any) -> None:
    own = low_rank_layers.product_sums_take

    def takes(sums: Any, transposed: bool, backend: str | None = None) -> bool:
        return not refused(sums, transposed) and own(sums, transposed, backend)

    monkeypatch.setattr(low_rank_layers, "product_sums_take", takes)


@pytest.mark.parametrize("of", ["q", "k", "v"])
def test_several_ranks_where_no_kernel_makes_the_inputs_gradient(
    of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, lambda _, transposed: transposed)
    model = adapted(rank_pattern={of: 16})
    wanted = run(model, fused=False)
    for _ in range(2):
        assert_near(run(model, fused=True), wanted)


def test_a_layer_that_no_kernel_computes_leaves_its_siblings_their_own(
    made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether one is computed so does not depend on what is known of the others."""
    refuse(monkeypatch, lambda sums, transposed: not transposed and sums[0].bias is None)
    model = adapted()  # k has no bias
    wanted = run(model, fused=False)
    run_twice(model, made)
    assert made == [3, 1]
    assert_near(run(model, fused=True), wanted)


@pytest.mark.parametrize("pending", [True, False])
def test_a_gradient_that_is_written_to_before_its_input_has_one(pending: bool) -> None:
    """Whoever made d_inner and d_b already reads b and inner no more."""
    x, d, inner, d_inner = (torch.zeros(1, 4, n) for n in (8, 8, 2, 2))
    a, b = torch.zeros(1, 2, 8), torch.zeros(1, 8, 2)
    shared = SharedInput(x.dtype)
    part = low_rank_layers.Part(
        x=x, d=d, adapted=low_rank_layers.Adapted(torch.zeros(8, 8), None, a, b),
        inner=low_rank_layers.Inner(inner, None), scale=1.0, d_inner=None if pending else d_inner,
        d_a=torch.zeros(1, 2, 8), d_b=torch.zeros(1, 8, 2) if pending else None, backend=None,
    )  # fmt: skip
    for written in (x, d, a, b, inner):
        low_rank_layers.leave(shared, part)
        written.add_(1.0)
        if not pending and any(written is tensor for tensor in (b, inner)):
            assert shared.take() is not None
            continue
        with pytest.raises(RuntimeError, match="expected gradients, factors and inputs that nobod"):
            shared.take()


class Taken(WeightProducts):
    """Takes the gradients of adapters that it was told to."""

    def __init__(self, model: nn.Module, ends: tuple[str, ...]) -> None:
        self.wanted = {p for name, p in model.named_parameters() if name.endswith(ends)}
        self.gradients: dict[Tensor, Tensor] = {}

    def take_gradient(self, factor: Tensor, gradient: Tensor) -> bool:
        if factor in self.wanted:
            self.gradients[factor] = gradient.fill_(torch.nan)
        return factor in self.wanted


A, B = "lora_A.default.weight", "lora_B.default.weight"


@pytest.mark.parametrize(
    ("ends", "options"),
    [
        ((A, B), {}),
        ((A, B), {"alpha_pattern": {"k": 24}}),
        ((A, B), {"rank_pattern": {"k": 16}, "lora_alpha": 8}),
        ((A,), {}),
        ((B,), {}),
        (("q." + A, "o." + B), {}),
        ((), {}),
    ],
)
@pytest.mark.parametrize("kernel", [True, False])
def test_gradients_that_somebody_takes_are_there_when_the_pass_has_ended(
    ends: tuple[str, ...], options: Any, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel:
        refuse(monkeypatch, lambda _, transposed: transposed)
    model = adapted(**options)
    wanted = run(model, fused=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    for _ in range(2):  # readers of an input one by one, and at once
        products = Taken(model, ends)
        x = inputs()
        with stand_ins(model, backend=BACKEND, products=products):
            y = model(x)
            y.float().square().sum().backward()
        taken = products.gradients
        assert len(taken) == len(products.wanted)
        for parameter in trained:
            assert (parameter.grad is None) == (parameter in taken)
        found = [taken.get(p, p.grad) for p in trained]
        assert_near([y.detach(), x.grad, *found], wanted)
        model.zero_grad()


def test_a_trained_base_takes_its_own_way(made: list[int]) -> None:
    model = adapted(bias="lora_only")
    wanted = run(model, fused=False)
    assert_near(run(model, fused=True), wanted)
    assert made == [1]  # the one layer without a bias


def test_an_input_without_a_gradient() -> None:
    model = adapted()
    block = block_of(model)
    block.forward = lambda x: Block.forward(block, x.detach())  # type: ignore[method-assign]
    wanted = run(model, fused=False)
    run(model, fused=True)
    assert_near(run(model, fused=True), wanted)


def test_a_frozen_factor() -> None:
    model = adapted()
    for name, parameter in model.named_parameters():
        if "q.lora_A" in name or "v.lora_B" in name:
            parameter.requires_grad_(False)
    wanted = run(model, fused=False)
    assert_near(run(model, fused=True), wanted)


def test_a_layer_that_runs_twice(made: list[int]) -> None:
    model = adapted()
    block = block_of(model)

    def twice(x: Tensor) -> Tensor:
        y = torch.sin(block.q(x)) + block.q(x) + block.k(torch.cos(x))
        z: Tensor = block.o(y + block.v(x))
        return z

    block.forward = twice  # type: ignore[method-assign]
    wanted = run(model, fused=False)
    for _ in range(3):
        made.clear()
        assert_near(run(model, fused=True), wanted)
        assert sum(made) == 5


def test_no_model_lives_on_in_what_is_known_of_its_layers() -> None:
    model = adapted()
    run(model, fused=True)
    run(model, fused=True)
    reference = weakref.ref(block_of(model).k)
    del model
    gc.collect()
    assert reference() is None
