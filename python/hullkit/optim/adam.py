# SPDX-License-Identifier: Apache-2.0
"""Adam and AdamW with several updates for one gradient."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from inspect import signature
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .._checks import check_int, check_tensor
from .._tensors import HALVES
from . import _kernels
from ._buckets import Bucket
from ._fused import FusedOptimizer
from ._record import AdamOptions
from ._state import State, state_like

# Torch's own argument is younger than the oldest torch supported.
_TORCH_DECOUPLES = "decoupled_weight_decay" in signature(torch.optim.Adam).parameters
_MOMENTS = ("exp_avg", "exp_avg_sq")
_FLOAT16 = (
    "hullkit: moments of float16 parameters are float16, as torch's: squares of gradients below "
    "2.4e-4 become 0 there, and updates below half a step are lost. Pass stochastic_rounding=True "
    "(moments in bfloat16, nothing lost on average), or keep parameters in float32"
)


def _refuse_amsgrad(groups: list[dict[str, Any]]) -> None:
    if any(group["amsgrad"] for group in groups):
        raise ValueError("amsgrad: expected False, got True: use torch.optim for AMSGrad")


class _FusedAdam(FusedOptimizer):
    stochastic_rounding: bool
    seed: int
    _hooked: list[dict[str, Any]] | None = None  # the states of the load that runs

    def _init_adam(self, stochastic_rounding: bool, seed: int, **options: Any) -> None:
        self.stochastic_rounding = bool(stochastic_rounding)
        self.seed = check_int("seed", seed, 0, (1 << 63) - 1)
        self._init_fused(**options)
        _refuse_amsgrad(self.param_groups)
        dtypes = {param.dtype for param in self._params()}
        if self.stochastic_rounding and dtypes and not dtypes & set(HALVES):
            raise TypeError(
                "stochastic_rounding: expected False unless a parameter is bfloat16 or float16, "
                f"got True for {', '.join(map(str, dtypes))}"
            )
        self._warn_of_float16(self._params(), stacklevel=4)

    def _warn_of_float16(self, params: Iterable[Tensor], stacklevel: int) -> None:
        if any(self._state_dtype(param) is torch.float16 for param in params):
            warnings.warn(_FLOAT16, stacklevel=stacklevel)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim. Options that the constructor refuses are refused here, too, and it
        warns of float16 as the constructor does."""
        super().add_param_group(param_group)
        if hasattr(self, "_sorted"):  # not while torch's constructor runs
            self._warn_of_float16(self.param_groups[-1]["params"], stacklevel=3)

    def __getstate__(self) -> dict[str, Any]:
        own = {name: self.__dict__[name] for name in ("stochastic_rounding", "seed")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        _refuse_amsgrad(state["param_groups"])
        super().__setstate__(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch.optim, but that moments of halves are taken over in bfloat16, without a
        detour through float16."""
        if self._hooked is not None:  # within a hook of another load, whose hooks serve this one
            super().load_state_dict(state_dict)
            return
        hooked: list[dict[str, Any]] = []

        def note(_: Any, given: dict[str, Any]) -> None:
            hooked.append(given)

        def take_over(_: Any) -> None:
            self._take_over_moments(hooked[-1])

        # The last hook before sees what the others have made of it, the first one after comes
        # before what they make of the moments.
        before = self.register_load_state_dict_pre_hook(note)
        after = self.register_load_state_dict_post_hook(take_over, prepend=True)
        try:
            self._hooked = hooked
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()
            self._hooked = None

    def _take_over_moments(self, state_dict: dict[str, Any]) -> None:
        indices = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, param in zip(indices, params, strict=True):
            for name in _MOMENTS:
                given = state_dict["state"].get(index, {}).get(name)
                if given is not None and self._state_dtype(param) != param.dtype:
                    given = check_tensor(f"state[{name!r}]", given)
                    moment = given.detach().to(param.device, self._state_dtype(param), copy=True)
                    self.state[param][name] = moment

    def _state_dtype(self, param: Tensor) -> torch.dtype:
        rounded = self.stochastic_rounding and param.dtype in HALVES
        return torch.bfloat16 if rounded else param.dtype

    def _seed(self) -> int:
        return self.seed

    def _state_of(self, group: dict[str, Any], param: Tensor) -> State:
        state = self.state[param]
        step = state.get("step")
        if step is None:
            step = torch.zeros((), dtype=torch.float32, device=param.device)
        elif not isinstance(step, Tensor):
            step = torch.tensor(float(step), dtype=torch.float32, device=param.device)
        elif check_tensor("state['step']", step).numel() != 1:  # kernels count in the first element
            raise ValueError(f"state['step']: expected one element, got shape {tuple(step.shape)}")
        state["step"] = step.to(param.device, torch.float32)
        dtype = self._state_dtype(param)
        return [*(state_like(state, name, param, dtype) for name in _MOMENTS), state["step"]], False

    def _options(self, group: dict[str, Any], lr: float) -> AdamOptions:
        _refuse_amsgrad([group])
        beta1, beta2 = map(float, group["betas"])
        decay = float(group["weight_decay"])
        decoupled = group.get("decoupled_weight_decay", isinstance(self, torch.optim.AdamW))
        return AdamOptions(
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            log2_beta1=_kernels.log2(beta1),
            log2_beta2=_kernels.log2(beta2),
            eps=float(group["eps"]),
            l2=0.0 if decoupled else decay,
            decay=decay if decoupled else 0.0,
            sign=-1.0 if group["maximize"] else 1.0,
        )

    def _kernel(self, bucket: Bucket, record: Tensor, num_steps: int) -> None:
        stochastic = self.stochastic_rounding and bucket.dtypes[0] in HALVES
        _kernels.adam_(bucket.table, record, bucket.dtypes, num_steps, stochastic)


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
        stochastic_rounding: round bfloat16 and float16 parameters, and their moments, up or down at
            random in proportion, so that updates smaller than half a step of the dtype are not
            lost. Other parameters are updated as ever. One at least must be a half.
        seed: of that noise, a hash of (seed, place of the parameter, step, element): the same bits
            in every run.
        backend: None: the C++ core for CPU tensors, Triton for CUDA tensors. "triton": Triton for
            CPU tensors as well, under its interpreter.

    Numerics: float32 arithmetic (float64 for float64 parameters), coefficients in float64. float16
    and bfloat16 parameters and moments are rounded once for a call, not once for an update. State
    as torch.optim's fused Adam: `step` (float32, on the parameter's device), `exp_avg`,
    `exp_avg_sq` (the parameter's dtype; bfloat16 where halves are rounded stochastically. Squares
    below 6e-8 are 0 in float16: a warning says so where torch's dtype is kept).
    Memory traffic: 7 words for each parameter whatever k is. One launch for all parameters of a
    group with the same dtypes. `state_dict` is interchangeable with torch.optim's.
    Raises TypeError or ValueError for complex, sparse, overlapping or non-dense tensors.
    Source: Kingma & Ba, arXiv 1412.6980; Loshchilov & Hutter, arXiv 1711.05101.

    >>> import hullkit, torch
    >>> p = torch.nn.Parameter(torch.ones(2)); p.grad = torch.ones(2)
    >>> hullkit.optim.Adam([p], lr=0.1).step(num_steps=3)
    >>> p.data
    tensor([0.7000, 0.7000])
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
        seed: int = 0,
        backend: str | None = None,
    ) -> None:
        decay = {"decoupled_weight_decay": decoupled_weight_decay}
        torch.optim.Adam.__init__(
            self, params, lr, betas, eps, weight_decay, amsgrad,
            maximize=maximize, capturable=capturable, **(decay if _TORCH_DECOUPLES else {}),
        )  # fmt: skip
        self.defaults.update(decay)
        for group in self.param_groups:  # a group may have its own
            group.setdefault("decoupled_weight_decay", decoupled_weight_decay)
        self._init_adam(
            stochastic_rounding, seed, max_grad_norm=max_grad_norm, backend=backend,
            foreach=foreach, fused=fused, differentiable=differentiable,
        )  # fmt: skip


class AdamW(_FusedAdam, torch.optim.AdamW):
    """torch.optim.AdamW with `step(num_steps=k)`: :class:`Adam` with decoupled weight decay.

    Args: as in :class:`Adam`; weight_decay is 0.01 by default.

    >>> import hullkit, torch
    >>> p = torch.nn.Parameter(torch.ones(2)); p.grad = torch.ones(2)
    >>> hullkit.optim.AdamW([p], lr=0.1).step(num_steps=3)
    >>> p.data
    tensor([0.6973, 0.6973])
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
        seed: int = 0,
        backend: str | None = None,
    ) -> None:
        torch.optim.AdamW.__init__(
            self, params, lr, betas, eps, weight_decay, amsgrad,
            maximize=maximize, capturable=capturable,
        )  # fmt: skip
        self._init_adam(
            stochastic_rounding, seed, max_grad_norm=max_grad_norm, backend=backend,
            foreach=foreach, fused=fused, differentiable=differentiable,
        )  # fmt: skip
