"""Optimizers that make several updates with one gradient, and weighted accumulation of gradients.

`Adam`, `AdamW` and `SGD` take the arguments of torch.optim's and keep its state, under its names:
`state_dict` goes either way. `step(num_steps=k)` makes k consecutive updates with the gradients at
hand for the memory traffic of one, in one launch for all parameters of a group.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import repeat
from operator import is_
from typing import Any

import torch
from torch import Tensor

from . import _multi_tensor
from ._checks import check_tensor
from ._fused import Bucket, FusedOptimizer, Options
from ._multi_tensor import DTYPES, TensorTable, is_dense, same_layout, uses_triton

__all__ = ["SGD", "Adam", "AdamW", "accumulate_"]

State = tuple[list[Tensor | None], bool]


def _like(state: dict[str, Any], name: str, param: Tensor) -> Tensor:
    """The state tensor of this name in the parameter's dtype and layout, made if missing."""
    tensor = state.get(name)
    if tensor is None:
        tensor = torch.zeros_like(param, memory_format=torch.preserve_format)
    elif tensor.dtype != param.dtype or not same_layout(tensor, param):
        if tensor.shape != param.shape:
            raise ValueError(
                f"state[{name!r}]: expected shape {tuple(param.shape)}, got {tuple(tensor.shape)}"
            )
        tensor = torch.empty_like(param).copy_(tensor)
    state[name] = tensor.to(param.device)
    return state[name]


def _refuse_amsgrad(groups: list[dict[str, Any]]) -> None:
    if any(group["amsgrad"] for group in groups):
        raise ValueError("amsgrad: expected False, got True: use torch.optim for AMSGrad")


class _FusedAdam(FusedOptimizer):
    stochastic_rounding: bool

    def _init_adam(self, stochastic_rounding: bool, **options: Any) -> None:
        self.stochastic_rounding = bool(stochastic_rounding)
        self._init_fused(**options)
        _refuse_amsgrad(self.param_groups)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "stochastic_rounding": self.stochastic_rounding}

    def __setstate__(self, state: dict[str, Any]) -> None:
        _refuse_amsgrad(state["param_groups"])
        super().__setstate__(state)

    def _check_params(self) -> None:
        super()._check_params()
        if self.stochastic_rounding:
            for param in self._params():
                if param.dtype is not torch.bfloat16:
                    raise TypeError(
                        "stochastic_rounding: expected False unless all parameters are bfloat16, "
                        f"got True for one of {param.dtype}"
                    )

    def _state_of(self, group: dict[str, Any], param: Tensor) -> State:
        state = self.state[param]
        step = state.get("step")
        if step is None:
            step = torch.zeros((), dtype=torch.float32, device=param.device)
        elif not isinstance(step, Tensor):
            step = torch.tensor(float(step), dtype=torch.float32)
        state["step"] = step.to(param.device, torch.float32)
        moments = [_like(state, name, param) for name in ("exp_avg", "exp_avg_sq")]
        return [*moments, state["step"]], False

    def _options(self, group: dict[str, Any], lr: float) -> Options:
        beta1, beta2 = map(float, group["betas"])
        decay = float(group["weight_decay"])
        decoupled = group.get("decoupled_weight_decay", isinstance(self, torch.optim.AdamW))
        weights = (0.0, decay) if decoupled else (decay, 0.0)
        logs = (_multi_tensor.log2(beta1), _multi_tensor.log2(beta2))
        sign = -1.0 if group["maximize"] else 1.0
        return (lr, beta1, beta2, *logs, float(group["eps"]), *weights, sign, 1.0)

    def _kernel(self, bucket: Bucket, record: Tensor, options: Options, num_steps: int) -> None:
        stochastic = self.stochastic_rounding
        _multi_tensor.adam_(bucket.table, record, options, bucket.dtypes, num_steps, stochastic)


class Adam(_FusedAdam, torch.optim.Adam):
    """torch.optim.Adam with `step(num_steps=k)`: k updates with one gradient in one pass.

    For t = step + 1, ..., step + k, with the same g (negated if maximize):

        g_t = g + weight_decay * p                 (L2; decoupled: p = p * (1 - lr * weight_decay))
        m = beta1 * m + (1 - beta1) * g_t,   v = beta2 * v + (1 - beta2) * g_t^2
        p = p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

    Equivalent to: k calls of torch.optim.Adam's `step()`; `hullkit.reference.adam`.

    Args:
        params, lr, betas, eps, weight_decay, maximize, capturable: as in torch.optim.Adam; `lr` may
            be a tensor on the parameters' device. Every step can be captured in a CUDA graph, once
            one ran outside the capture.
        amsgrad, differentiable: must be False; foreach: None or False; fused: None or True.
        decoupled_weight_decay: AdamW's weight decay.
        max_grad_norm: scale all gradients of a step together so that their global 2-norm is at
            most this, as torch.nn.utils.clip_grad_norm_ does but without writing them; `grad_norm`
            then holds the norm before. None: no clipping.
        stochastic_rounding: round bfloat16 parameters up or down at random in proportion, so that
            updates smaller than half a step of bfloat16 are not lost. Deterministic: the noise is a
            hash of element, parameter and step. Parameters must all be bfloat16.
        backend: None: the C++ core for CPU tensors, Triton for CUDA tensors. "triton": Triton for
            CPU tensors as well, under its interpreter.

    Numerics: float32 arithmetic (float64 for float64 parameters), coefficients in float64. float16
    and bfloat16 parameters and moments are rounded once for a call, not once for an update. State
    as torch.optim's fused Adam: `step` (float32, on the parameter's device), `exp_avg`,
    `exp_avg_sq` (the parameter's dtype).
    Memory traffic: 7 words for each parameter whatever k is. One launch for all parameters of a
    group with the same dtypes. `state_dict` is interchangeable with torch.optim's.
    Raises TypeError or ValueError for complex, sparse, overlapping or non-dense tensors.
    Source: Kingma & Ba, arXiv 1412.6980; Loshchilov & Hutter, arXiv 1711.05101.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        stochastic_rounding: bool = False,
        backend: str | None = None,
    ) -> None:
        torch.optim.Adam.__init__(
            self, params, lr, betas, eps, weight_decay, amsgrad,
            maximize=maximize, capturable=capturable,
        )  # fmt: skip
        # Set here because torch's own argument is younger than the oldest torch supported.
        self.defaults["decoupled_weight_decay"] = decoupled_weight_decay
        for group in self.param_groups:
            group["decoupled_weight_decay"] = decoupled_weight_decay
        self._init_adam(
            stochastic_rounding, max_grad_norm=max_grad_norm, backend=backend, foreach=foreach,
            fused=fused, differentiable=differentiable,
        )  # fmt: skip


class AdamW(_FusedAdam, torch.optim.AdamW):
    """torch.optim.AdamW with `step(num_steps=k)`: :class:`Adam` with decoupled weight decay.

    Args: as in :class:`Adam`; weight_decay is 0.01 by default.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        stochastic_rounding: bool = False,
        backend: str | None = None,
    ) -> None:
        torch.optim.AdamW.__init__(
            self, params, lr, betas, eps, weight_decay, amsgrad,
            maximize=maximize, capturable=capturable,
        )  # fmt: skip
        self._init_adam(
            stochastic_rounding, max_grad_norm=max_grad_norm, backend=backend, foreach=foreach,
            fused=fused, differentiable=differentiable,
        )  # fmt: skip


class SGD(FusedOptimizer, torch.optim.SGD):
    """torch.optim.SGD with `step(num_steps=k)`: k updates with one gradient in one pass.

    For each of the k updates, with the same g (negated if maximize):

        g_t = g + weight_decay * p
        b = momentum * b + (1 - dampening) * g_t   (the first update ever: b = g_t)
        p = p - lr * (g_t + momentum * b if nesterov else b)

    Equivalent to: k calls of torch.optim.SGD's `step()`; `hullkit.reference.sgd`.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.
        foreach, differentiable, fused, max_grad_norm, backend: as in :class:`Adam`.

    Numerics and errors as in :class:`Adam`. State: `momentum_buffer`, only with momentum.
    Memory traffic: 5 words for each parameter, 3 without momentum, whatever k is.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        backend: str | None = None,
    ) -> None:
        torch.optim.SGD.__init__(
            self, params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize
        )
        self._init_fused(
            max_grad_norm=max_grad_norm, backend=backend, foreach=foreach, fused=fused,
            differentiable=differentiable,
        )  # fmt: skip

    def _state_of(self, group: dict[str, Any], param: Tensor) -> State:
        if not group["momentum"]:
            return [None, None, None], False
        state = self.state[param]
        # Undamped, a buffer of zeros takes the first gradient as it is.
        fresh = state.get("momentum_buffer") is None and group["dampening"] != 0
        return [_like(state, "momentum_buffer", param), None, None], fresh

    def _variant(self, group: dict[str, Any]) -> bool:
        return bool(group["momentum"])

    def _options(self, group: dict[str, Any], lr: float) -> Options:
        momentum = float(group["momentum"])
        undamped = 1.0 - float(group["dampening"]) if momentum else 1.0
        decay, nesterov = float(group["weight_decay"]), float(group["nesterov"])
        sign = -1.0 if group["maximize"] else 1.0
        return (lr, momentum, undamped, decay, nesterov, 0.0, 0.0, 0.0, sign, 1.0)

    def _kernel(self, bucket: Bucket, record: Tensor, options: Options, num_steps: int) -> None:
        _multi_tensor.sgd_(bucket.table, record, options, bucket.dtypes, num_steps)


# Tables of the lists accumulated into lately: they hold addresses and sizes only, which are the key.
_tables: OrderedDict[tuple[Any, ...], TensorTable] = OrderedDict()
_MAX_TABLES = 8
_captured_tables: list[TensorTable] = []  # that CUDA graphs read at every replay


def accumulate_(
    into: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    weight: float = 1.0,
    *,
    norm: bool = False,
    backend: str | None = None,
) -> Tensor | None:
    """`into[i] += weight * grads[i]` for a list of tensors, in one pass.

    With weights counts_i / total this builds the mean gradient of a multiset of examples from one
    gradient for each distinct example (the accumulation form of test-time finetuning).
    Equivalent to: `torch._foreach_add_(into, grads, alpha=weight)`, in float32.

    Args:
        into: float32 accumulators, dense, on one device.
        grads: gradients of the same shapes, float64, float32, float16 or bfloat16, one dtype; None
            leaves its accumulator alone.
        weight: a finite number.
        norm: whether to return the global 2-norm of the accumulators these gradients went into,
            from the same pass.
        backend: as in :class:`Adam`.
    Returns:
        0-d float64 tensor on the accumulators' device if `norm`, else None.
    Raises:
        TypeError, ValueError: lists of different lengths, shapes, devices, dtypes; nothing is
            written then.

    Numerics: a product and a sum in float32; the norm's squares in float32 within a block of a few
    thousand elements, in float64 across. Memory traffic: 3 words for each element.
    """
    if len(into) != len(grads):
        raise ValueError(f"grads: expected {len(into)}, as many as into, got {len(grads)}")
    if not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise ValueError(f"weight: expected a finite number, got {weight!r}")
    if any(map(is_, grads, repeat(None))):
        pairs = [(a, g) for a, g in zip(into, grads, strict=True) if g is not None]
        into, grads = [a for a, _ in pairs], [g for _, g in pairs]
    if not into:
        return torch.zeros((), dtype=torch.float64) if norm else None
    sources = _check_lists(into, grads)
    device, dtype = into[0].device, grads[0].dtype
    triton = uses_triton("into", device, backend)
    stretches = list(zip(map(Tensor.data_ptr, into), map(Tensor.numel, into), strict=True))
    key = (device, triton, *stretches)
    table = _tables.get(key)
    if table is None:
        rows = [(address, 0, 0, 0, numel, 0) for address, numel in stretches]
        table = _tables[key] = TensorTable(rows, device, triton)
        if len(_tables) > _MAX_TABLES:
            _, oldest = _tables.popitem(last=False)
            if oldest.captured:
                _captured_tables.append(oldest)
    _tables.move_to_end(key)
    options = (float(weight), *[0.0] * (_multi_tensor.NUM_OPTIONS - 1))
    record = table.record(list(map(Tensor.data_ptr, sources)), options)
    squares = _multi_tensor.accumulate_(table, record, float(weight), dtype)
    torch.autograd.graph.increment_version(into)
    return squares.sum(dtype=torch.float64).sqrt() if norm else None


def _check_lists(into: Sequence[Tensor], grads: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradients, in the layout of their accumulators."""
    if all(isinstance(tensor, Tensor) for tensor in (*into, *grads)):
        device, dtype = into[0].device, grads[0].dtype
        if (
            dtype in DTYPES
            and all(tensor.dtype is torch.float32 and tensor.device == device for tensor in into)
            and all(tensor.dtype is dtype and tensor.device == device for tensor in grads)
            and all(tensor.layout is torch.strided for tensor in (*into, *grads))
            and list(map(Tensor.size, into)) == list(map(Tensor.size, grads))
            and all(tensor.is_contiguous() for tensor in (*into, *grads))
        ):
            return grads  # the usual case, cheaply
    check_tensor("into[0]", into[0])
    check_tensor("grads[0]", grads[0])
    device, dtype = into[0].device, grads[0].dtype
    pairs = enumerate(zip(into, grads, strict=True))
    return [_check_pair(place, a, grad, device, dtype) for place, (a, grad) in pairs]


def _check_pair(
    place: int, into: Tensor, grad: Tensor, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The gradient, in the accumulator's layout."""
    check_tensor(f"into[{place}]", into)
    check_tensor(f"grads[{place}]", grad)
    if into.dtype is not torch.float32 or not is_dense(into):
        raise TypeError(
            f"into[{place}]: expected a dense float32 tensor, got {into.dtype} with strides "
            f"{into.stride()}"
        )
    if grad.dtype is not dtype or dtype not in DTYPES:
        raise TypeError(
            f"grads[{place}]: expected one dtype for all, float64, float32, float16 or bfloat16, "
            f"got {grad.dtype}"
        )
    if into.device != device or grad.device != device or grad.shape != into.shape:
        raise ValueError(
            f"grads[{place}]: expected shape {tuple(into.shape)} on {device}, got "
            f"{tuple(grad.shape)} on {grad.device} for an accumulator on {into.device}"
        )
    return grad if same_layout(grad, into) else torch.empty_like(into, dtype=dtype).copy_(grad)
