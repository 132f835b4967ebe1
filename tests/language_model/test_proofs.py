# SPDX-License-Identifier: Apache-2.0
"""What a module computes is found by trying it: values, gradients, and what it leaves behind."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hullkit.language_model.gated_layers import GatedLayer
from hullkit.language_model.norms import Norm
from hullkit.language_model.proofs import proof
from torch import Tensor, nn


class Act(nn.Module):
    """An activation whose forward is given."""

    def __init__(self, function: Callable[..., Tensor] = F.gelu, **attributes: Any) -> None:
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Gated(nn.Module):
    def __init__(self, of_gate: Callable[[Tensor], Tensor] = lambda g: g) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(6, 9), nn.Linear(6, 9)
        self.down, self.act = nn.Linear(9, 6), Act(F.silu)
        self.of_gate = of_gate

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.of_gate(self.act(self.gate(x))) * self.up(x))
        return out


class RMSNorm(nn.Module):
    def __init__(
        self,
        of_weight: Callable[[Tensor], Tensor] = lambda w: w,
        of_root: Callable[[Tensor], Tensor] = lambda r: r,
        weight: float = 1.0,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), weight))
        self.eps = 1e-6
        self.of_weight, self.of_root = of_weight, of_root

    def forward(self, x: Tensor) -> Tensor:
        root = self.of_root((x.float().square().mean(-1, keepdim=True) + self.eps).rsqrt())
        return self.of_weight(self.weight) * (x.float() * root).to(x.dtype)


def test_what_is_known() -> None:
    assert proof(Act()) == "gelu"
    assert isinstance(proof(Gated()), GatedLayer)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert proof(RMSNorm().to(dtype)) == Norm(1e-6, rounded=dtype is not torch.float32)
        assert proof(RMSNorm(lambda w: 1.0 + w, weight=0.0).to(dtype)) is not None


def test_another_gradient_is_another_function() -> None:
    """Detached, straight-through and scaled ones have the formula's values."""
    assert proof(Act(lambda x: x + (F.gelu(x) - x).detach())) is None
    assert proof(Act(lambda x: 0.5 * F.gelu(x) + 0.5 * F.gelu(x).detach())) is None
    assert proof(Act(lambda x: F.gelu(x).detach())) is None
    assert proof(Gated(Tensor.detach)) is None
    assert proof(Gated(lambda g: g + (g - g.detach()))) is None
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert proof(RMSNorm(of_root=Tensor.detach).to(dtype)) is None
        assert proof(RMSNorm(Tensor.detach).to(dtype)) is None
        # Among many columns a detached root hardly shows in a gradient along a random direction.
        assert proof(RMSNorm(of_root=Tensor.detach, width=4096).to(dtype)) is None


@pytest.mark.parametrize("width", [64, 3072, 5376, 16384])
@pytest.mark.parametrize("eps", [1e-3, 1e-5, 1e-6])
def test_norms_of_real_sizes_are_known(width: int, eps: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for of_weight, weight in ((lambda w: w, 1.0), (lambda w: 1.0 + w, 0.0)):
            norm = RMSNorm(of_weight, weight=weight, width=width).to(dtype)
            norm.eps = eps
            assert proof(norm) is not None


@pytest.mark.parametrize(
    ("of_weight", "weight"),
    [
        (torch.square, 1.0),
        (torch.abs, 1.0),
        (torch.exp, 0.0),
        (lambda w: 1.0 + torch.tanh(w), 0.0),
        (lambda w: w.clamp(0.0, 1.0), 1.0),
        (lambda w: w.clamp(-1.0, 1.0), 0.0),
    ],
)
def test_functions_of_a_weight_that_agree_where_it_is(
    of_weight: Callable[[Tensor], Tensor], weight: float
) -> None:
    """Training and users change it later."""
    assert proof(RMSNorm(of_weight, weight=weight)) is None


def test_a_norm_of_what_was_scaled() -> None:
    """With a weight of zeros it has the values of one that scales what it has normed."""

    class Scaled(RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            y = (1.0 + self.weight) * x
            return y * (y.square().mean(-1, keepdim=True) + self.eps).rsqrt()

    assert proof(Scaled(weight=0.0)) is None


class Leaving(Act):
    """It leaves something for a model's loss, or for later."""

    def __init__(self, leave: Callable[[Any, Tensor], None]) -> None:
        super().__init__(calls=0, seen=[], sizes={}, total=torch.zeros(()))
        self.leave = leave

    def forward(self, x: Tensor) -> Tensor:
        self.leave(self, x)
        return F.gelu(x)


@pytest.mark.parametrize(
    "leave",
    [
        lambda act, x: setattr(act, "penalty", x.abs().mean()),
        lambda act, x: setattr(act, "calls", act.calls + 1),
        lambda act, x: act.seen.append(x),
        lambda act, x: act.sizes.update(last=len(x)),
        lambda act, x: act.total.add_(1.0),
        lambda act, x: x.mul_(1.0),
    ],
    ids=["attribute", "count", "list", "dict", "tensor", "input"],
)
def test_what_a_forward_leaves_behind(leave: Callable[[Any, Tensor], None]) -> None:
    """It would be missed, and a trial leaves nothing itself."""
    act = Leaving(leave)
    before = {name: str(value) for name, value in vars(act).items()}
    assert proof(act) is None
    layer = Gated()
    layer.act = act
    assert (proof(layer) is None) == (leave.__code__.co_names != ("mul_",))  # nobody sees that one
    assert {name: str(value) for name, value in vars(act).items()} == before


class Setting:
    slope = 1.0


def test_a_change_is_seen() -> None:
    scaled = Act(scale=torch.tensor(1.0), setting=Setting(), limits={"low": [None]})
    scaled.function = lambda x: F.gelu(x) * scaled.scale * scaled.setting.slope
    assert proof(scaled) == "gelu"
    scaled.scale.fill_(5.0)
    assert proof(scaled) is None
    scaled.scale = torch.tensor(1.0)
    assert proof(scaled) == "gelu"
    scaled.setting.slope = 2.0
    assert proof(scaled) is None


@pytest.mark.parametrize("kind", [dict, OrderedDict, lambda d: defaultdict(float, d)])
def test_a_change_in_a_dict_is_seen(kind: Callable[[Any], dict[str, float]]) -> None:
    scaled = Act(scales=kind({"all": 1.0}))
    scaled.function = lambda x: F.gelu(x) * scaled.scales["all"]
    assert proof(scaled) == "gelu"
    scaled.scales["all"] = 2.0
    assert proof(scaled) is None


def test_another_function_at_the_address_of_one_before() -> None:
    act = Act(lambda x: F.gelu(x))
    assert proof(act) == "gelu"
    for _ in range(8):  # CPython gives memory to the next object of its size
        act.function = None  # type: ignore[assignment]
        act.function = lambda x: 5.0 * torch.tanh(x)
        assert proof(act) is None


class Slots:
    """No weak reference to it can be made."""

    __slots__ = ("owner",)


class Unbound:
    """As a name of a context that is not there."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(f"unbound: {name}")


def test_attributes_of_any_kind() -> None:
    many = [torch.zeros(1) for _ in range(10_000)]
    act = Act(two=many, three=float("nan"), four=torch.eye(2).to_sparse())
    act.__dict__["one"] = Unbound()
    assert proof(act) == proof(act) == "gelu"


@pytest.mark.parametrize(
    "block", [torch.inference_mode, lambda: torch.autocast("cpu"), torch.no_grad]
)
def test_the_callers_modes_do_not_matter(block: Callable[[], Any]) -> None:
    with block():
        assert proof(Act()) == "gelu"
        assert isinstance(proof(Gated()), GatedLayer)
        assert proof(RMSNorm()) == Norm(1e-6)


def test_a_trial_leaves_weights_in_dicts_of_other_kinds() -> None:
    class Own(dict[str, Any]):
        pass

    norm = RMSNorm()
    norm.__dict__["_parameters"] = Own(norm._parameters)
    weight = norm.weight
    assert proof(norm) == Norm(1e-6)
    assert norm.weight is weight
    assert bool((weight == 1.0).all())


def test_a_proof_keeps_no_module() -> None:
    act = Act()
    act.owner = [act]  # type: ignore[assignment]
    act.method = act.float  # type: ignore[assignment]
    act.slots = Slots()  # type: ignore[assignment]
    act.slots.owner = act  # type: ignore[union-attr]
    act.space = SimpleNamespace(owner=act, deep=[[[[[act]]]]])  # type: ignore[assignment]
    assert proof(act) == "gelu"
    gone = weakref.ref(act)
    del act
    gc.collect()
    assert gone() is None


def test_parts_that_are_not_there() -> None:
    layer: Any = Gated()
    layer.act = None
    assert proof(layer) is None
    layer = Gated()
    layer.down = Act(in_features=9)
    assert proof(layer) is None


class Meter:
    n = 0


def test_a_trial_draws_no_random_numbers_of_the_callers() -> None:
    """Neither do the random layers that are its parts, nor a forward that fails."""

    def fails(x: Tensor) -> Tensor:
        torch.rand(3)
        raise RuntimeError

    layer = Gated()
    before = torch.get_rng_state()
    noisy = Act(lambda x: F.gelu(x) + 0.0 * torch.rand_like(x))  # it has gelu's values
    for module in (layer, noisy, Act(fails)):
        assert (proof(module) is None) == (module is not layer)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("where", ["attribute", "object"])
def test_what_counts_its_calls_is_tried_twice_at_most(where: str) -> None:
    """Its attributes change in every pass, which would be a reason to try it again."""
    trials = []

    class Counted(Act):
        def forward(self, x: Tensor) -> Tensor:
            self.meter.n += 1  # type: ignore[operator, union-attr]
            trials.append(len(x))
            return F.gelu(x)

    act = Counted(meter=Meter())
    if where == "attribute":
        act = Leaving(lambda act, x: (setattr(act, "calls", act.calls + 1), trials.append(1)))  # type: ignore[arg-type, return-value]
    for _ in range(5):
        assert proof(act) is None
        act(torch.ones(2, 2))
    assert len(trials) == 5 + 2


def test_a_module_that_is_set_up_in_its_first_forward() -> None:
    act = Leaving(lambda act, x: setattr(act, "ready", True))
    assert proof(act) is None
    act(torch.ones(2, 2))
    assert proof(act) == "gelu"
