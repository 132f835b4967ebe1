# SPDX-License-Identifier: Apache-2.0
"""Functions of torch that run fused while a pass lasts, whatever model calls them.

A model's linear layers, norms, activations, gates and attention are calls of torch's functions. In
a pass each call goes to a kernel that computes the same and has a cheaper backward pass. So it
fits every architecture, and a layer that somebody changed stays changed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._tensors import HALVES, uses_triton
from ..native.torch_private import is_transformed
from . import short_attention
from .adapted_layers import AdaptedLayers
from .gates import gated
from .low_rank import LowRank, add_low_rank_, factors
from .norms import WIDEST, Norm, norm
from .pass_modes import PassMode
from .products import (
    SharedInput,
    SharedInputs,
    WeightProducts,
    linear,
    share,
)
from .recent_tensors import RecentTensors, has_hooks
from .residual_norms import NormCall, ResidualNorms
from .residuals import NarrowGradient, add_residual
from .rotary import Rotation
from .saved_tensors import Saved
from .trials import trial

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def _is_plain(x: Any) -> bool:
    """Whether x is torch's own tensor, and stands for no others as in torch.vmap.

    A class of somebody else's has functions of its own.
    """
    return type(x) in (Tensor, nn.Parameter) and not is_transformed(x)


def _is_row(x: Any) -> bool:
    """A plain vector whose elements are neighbours, as kernels read weights."""
    return _is_plain(x) and x.ndim == 1 and x.is_contiguous()


class FusedFunctions(PassMode):
    """Inside this mode some functions of torch are fused ones. One object serves one pass.

    saved: recomputes outputs of activations, so that they need not be saved.
    backend: "triton" takes CPU tensors too, in Triton's interpreter.
    inputs: of the pass's linear layers, if others share them too.
    products: is told of the gradients of linear layers' weights, and offered adapters'.
    """

    def __init__(
        self,
        saved: Saved | None = None,
        backend: str | None = None,
        inputs: SharedInputs | None = None,
        products: WeightProducts | None = None,
    ) -> None:
        super().__init__()
        self.names: set[str] = set()  # of the functions that were fused
        self._saved = saved
        self._backend = backend
        self._inputs = SharedInputs() if inputs is None else inputs
        self._products = products
        self.adapted = AdaptedLayers(backend, products)
        # For the result of an activation: the gate, its version then, and the activation's name.
        self._activated: RecentTensors[tuple[Tensor, int, str]] = RecentTensors()
        # For a norm's input: what `share` made of it, and the norm's weight.
        self._normed: RecentTensors[tuple[Tensor, SharedInput, Tensor]] = RecentTensors()
        self._residuals = ResidualNorms()
        self._sums: RecentTensors[NarrowGradient] = RecentTensors()
        # For a result of `rotary`: its call, and whether it is k.
        self._rotated: RecentTensors[tuple[Rotation, bool]] = RecentTensors()

    def handle(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        handler = _HANDLERS.get(func)
        if handler is not None and _takes_arguments(handler, args, kwargs):
            result = handler(self, *args, **kwargs)
            if result is not NotImplemented:
                self.names.add(_NAMES[func])
                return result
        return func(*args, **kwargs)

    def takes(self, x: Any) -> bool:
        """Whether kernels may run on this tensor: on a GPU, in a pass that has a backward half."""
        return (
            _is_plain(x)
            and torch.is_grad_enabled()
            and uses_triton("x", x.device, self._backend)
            and x.numel() > 0
            and x.dtype in (torch.float32, *HALVES)
        )

    def _dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of products: autocast's, or x's own."""
        kind = x.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype

    # Handlers have torch's names of arguments: models pass them by keyword too.

    # Linear layers.

    def _fits(self, x: Tensor, weight: Any, bias: Any) -> bool:
        if not self.takes(x) or not _is_plain(weight) or weight.ndim != 2 or x.ndim < 2:
            return False
        if bias is not None and not _is_plain(bias):
            return False
        # Without a cast torch refuses other dtypes; let it.
        known = (torch.float32, *HALVES) if self._casts(x) else (x.dtype,)
        return weight.dtype in known and (bias is None or bias.dtype in known)

    def linear(self, input: Any, weight: Any, bias: Any = None) -> Any:
        if not self._fits(input, weight, bias) or input.shape[-1] != weight.shape[1]:
            return NotImplemented
        if bias is not None and bias.shape != (weight.shape[0],):
            return NotImplemented
        tensor, shared = self._inputs.of(input, self._dtype(input))
        return linear(tensor, shared, weight, bias, False, self._products)

    def addmm(self, input: Any, mat1: Any, mat2: Any) -> Any:
        """A linear layer if `input`, its bias, is a row and mat2, its weight, a parameter."""
        bias, x, weight = input, mat1, mat2
        if not isinstance(bias, Tensor) or not self._fits(x, weight, bias):
            return NotImplemented
        if not weight.is_leaf or x.ndim != 2 or x.shape[1] != weight.shape[0]:
            return NotImplemented
        if bias.shape != (weight.shape[1],):
            return NotImplemented
        tensor, shared = self._inputs.of(x, self._dtype(x))
        return linear(tensor, shared, weight, bias, True, self._products)

    def low_rank(self, module: Any, adapter: LowRank, x: Any) -> Any:
        """base(x) + scale (x a^T) b^T of PEFT's layer, which was found to compute this."""
        base = module.base_layer
        a, b = factors(module, adapter)
        if not self._fits(x, base.weight, base.bias):
            return NotImplemented
        if not self._fits(x, a, None) or not self._fits(x, b, None):
            return NotImplemented
        tensor, shared = self._inputs.of(x, self._dtype(x))
        y = self.adapted.output(module, tensor, shared)
        if y is not None:
            return y
        y = base(x)  # nobody else has seen it
        return add_low_rank_(y, tensor, shared, a, b, adapter.scale, self._backend)

    # Norms.

    def layer_norm(
        self,
        input: Any,
        normalized_shape: Any,
        weight: Any = None,
        bias: Any = None,
        eps: float = 1e-5,
    ) -> Any:
        x = input
        if not self.takes(x) or not _is_row(weight) or len(weight) > WIDEST:
            return NotImplemented
        if tuple(normalized_shape) != tuple(weight.shape) or x.shape[-1] != len(weight):
            return NotImplemented
        if bias is not None and not (_is_row(bias) and bias.shape == weight.shape):
            return NotImplemented
        if not self._casts(x) and (
            weight.dtype is not x.dtype or (bias is not None and bias.dtype is not x.dtype)
        ):
            return NotImplemented
        # Autocast computes layer norms in float32.
        return self._norm(x, weight, bias, Norm(eps, rms=False), self._casts(x))

    def rms_norm(self, x: Any, weight: Tensor, formula: Norm) -> Any:
        """An RMS norm of a model's own, whose result has x's dtype."""
        if not self.takes(x) or not _is_row(weight) or x.shape[-1] != len(weight):
            return NotImplemented
        if x.dtype is not weight.dtype:
            return NotImplemented
        return self._norm(x, weight, None, formula, wide=False)

    def _casts(self, x: Tensor) -> bool:
        return torch.is_autocast_enabled(x.device.type)

    def _norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, formula: Norm, wide: bool
    ) -> Tensor:
        dtype = torch.float32 if wide else x.dtype
        known = self._normed.get(x)
        entered, around = share(x, x.dtype) if known is None else known[:2]
        self._normed.note(x, (entered, around, weight))
        narrow = self._dtype(x) is torch.bfloat16 and dtype is not torch.bfloat16
        made = self._residuals.take(x, NormCall(weight, bias, formula, dtype, narrow))
        shared = SharedInput(dtype) if narrow else None
        y, halved = norm(
            entered, weight, bias, formula, dtype, shared, around, self._sums.get(x), made
        )
        if shared is not None and halved is not None:
            self._inputs.note(y, halved, shared)
        return y

    def add(self, input: Any, other: Any) -> Any:
        """The sum of a norm's input and what came of the norm: a residual."""
        if not self.takes(input) or not self.takes(other):
            return NotImplemented
        dtype = torch.promote_types(input.dtype, other.dtype)
        for x, branch in ((input, other), (other, input)):
            known = self._normed.get(x)
            if known is not None and x.shape == branch.shape and x.dtype is dtype:
                narrows = branch.dtype is not dtype and branch.requires_grad
                narrowed = NarrowGradient(branch.dtype) if narrows else None
                entered, around, before = known
                made = self._residuals.add(entered, branch, before)
                total, ahead = (None, None) if made is None else made
                result = add_residual(entered, around, branch, narrowed, total)
                self._residuals.note(result, before, branch.dtype, ahead)
                if narrowed is not None:
                    self._sums.note(result, narrowed)
                return result
        return NotImplemented

    # Activations, and what they are multiplied with.

    def activation(self, name: str, x: Tensor) -> Tensor:
        """An activation of ACTIVATIONS."""
        function = ACTIVATIONS[name]
        y = function(x) if self._saved is None else self._saved.cheap(function, x)
        if self.takes(x) and y.dtype is x.dtype and x.is_contiguous():
            self._activated.note(y, (x, x._version, name))
        return y

    def silu(self, input: Any, inplace: bool = False) -> Any:
        if inplace or not self.takes(input):
            return NotImplemented
        return self.activation("silu", input)

    def gelu(self, input: Any, *, approximate: str = "none") -> Any:
        if not self.takes(input) or approximate not in ("none", "tanh"):
            return NotImplemented
        return self.activation("gelu" if approximate == "none" else "gelu_tanh", input)

    def multiply(self, input: Any, other: Any) -> Any:
        for y, up in ((input, other), (other, input)):
            known = self._activated.get(y) if isinstance(y, Tensor) else None
            if known is None or has_hooks(y):
                continue
            gate, version, name = known
            if isinstance(up, Tensor) and up is not y and gate._version == version:
                return self.gated(gate, up, name)
        return NotImplemented

    def gated(self, gate: Any, up: Any, name: str) -> Any:
        """act(gate) * up with an activation of ACTIVATIONS."""
        for x in (gate, up):
            if not self.takes(x) or not x.is_contiguous():
                return NotImplemented
        same = up.shape == gate.shape and up.dtype is gate.dtype
        return gated(gate, up, name) if same else NotImplemented

    # Attention.

    def attention(
        self,
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        q, k, v = query, key, value
        if attn_mask is not None or dropout_p or not is_causal or not self.takes(q):
            return NotImplemented
        half = self._dtype(q)
        if half not in HALVES or not short_attention.takes(q, k, v):
            return NotImplemented
        if q.shape[1] != k.shape[1] and not enable_gqa:
            return NotImplemented
        scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
        if not scale > 0.0:
            return NotImplemented
        rotation = None if has_hooks(q) or has_hooks(k) else self._rotation_of(q, k)
        return short_attention.causal_attention(q, k, v, scale, half, rotation)

    def _rotation_of(self, q: Tensor, k: Tensor) -> Rotation | None:
        """The rotation of which these are the two results, in this order."""
        of_q, of_k = self._rotated.get(q), self._rotated.get(k)
        if of_q is None or of_k is None or of_q[0] is not of_k[0]:
            return None
        return None if of_q[1] or not of_k[1] else of_q[0]

    def note_rotation(self, q: Tensor, k: Tensor, rotation: Rotation) -> None:
        """Remembers that `rotary` made q and k in one call, for attention that reads both."""
        self._rotated.note(q, (rotation, False))
        self._rotated.note(k, (rotation, True))


_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: FusedFunctions.linear,
    torch.addmm: FusedFunctions.addmm,
    F.layer_norm: FusedFunctions.layer_norm,
    F.silu: FusedFunctions.silu,
    F.gelu: FusedFunctions.gelu,
    torch.mul: FusedFunctions.multiply,
    Tensor.mul: FusedFunctions.multiply,
    torch.add: FusedFunctions.add,
    Tensor.add: FusedFunctions.add,
    F.scaled_dot_product_attention: FusedFunctions.attention,
}
_PARAMETERS = {of: inspect.signature(of).parameters for of in _HANDLERS.values()}
_NAMES = {
    F.linear: "torch.nn.functional.linear",
    torch.addmm: "torch.addmm",
    F.layer_norm: "torch.nn.functional.layer_norm",
    F.silu: "torch.nn.functional.silu",
    F.gelu: "torch.nn.functional.gelu",
    torch.mul: "torch.mul",
    Tensor.mul: "torch.mul",
    torch.add: "torch.add",
    Tensor.add: "torch.add",
    F.scaled_dot_product_attention: "torch.nn.functional.scaled_dot_product_attention",
}


def _takes_arguments(handler: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Whether a handler knows them all. What it does not know, such as `out`, is torch's."""
    parameters = _PARAMETERS[handler]  # self is among them
    return len(args) < len(parameters) and kwargs.keys() <= parameters.keys()


def proven_activation(module: Any, dtype: torch.dtype, device: torch.device) -> str | None:
    """The activation of ACTIVATIONS that a module without tensors computes; None if none is known.

    It is tried on numbers of both signs, small and large, so that a clip or a scale shows.
    """
    steps = torch.linspace(-4.0, 4.0, 160, dtype=torch.float64, device="cpu")
    x = torch.cat([steps, 10.0**steps, -(10.0**steps)])[None].to(device, dtype)
    tried = trial(module, x)
    if tried is None or tried.y.shape != x.shape:
        return None
    # Each of the few steps of a written-out function rounds once.
    bound = 8.0 * torch.finfo(dtype).eps * x.double().abs().clamp_min(1.0)
    for name, function in ACTIVATIONS.items():
        wanted = function(tried.leaves[0].double())
        if bool(((wanted - tried.y.double()).abs() <= bound).all()):
            return name if tried.has_gradients_of(wanted, 1e-3) else None
    return None
