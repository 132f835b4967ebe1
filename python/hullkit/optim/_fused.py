# SPDX-License-Identifier: Apache-2.0
"""The base of the fused optimizers: k updates in a pass, with clipping, and in backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .._checks import check_int, check_number
from ..native.kernels import uninterrupted
from . import _kernels
from ._buckets import (
    Bucket,
    Launch,
    check_grad,
    check_keys,
    check_mapping,
    check_options,
    check_params,
)
from ._in_backward import update_in_backward
from ._record import FACTOR, LR, MAX_NUM_STEPS, StepOptions
from ._tables import TabledOptimizer
from ._watched import untraced, watched

_ON_DEVICE = math.nan  # an option that is filled in on the device

# Options of torch's that ask for another way of computing a step, or for other steps.
_REFUSED = {"foreach": True, "fused": False, "differentiable": True, "amsgrad": True}


class FusedOptimizer(TabledOptimizer):
    """A torch optimizer whose `step(num_steps=k)` makes k updates in one pass over memory."""

    max_grad_norm: float | None
    grad_norm: Tensor | None  # global norm of the latest step's gradients, if it clipped

    # A subclass defines its options and its kernel, too.

    def _seed(self) -> int:
        return 0

    def _options(self, group: dict[str, Any], lr: float) -> StepOptions:
        raise NotImplementedError

    def _kernel(self, bucket: Bucket, record: Tensor, num_steps: int) -> None:
        raise NotImplementedError

    def _init_fused(
        self,
        *,
        max_grad_norm: float | None,
        backend: str | None,
        foreach: bool | None,
        fused: bool | None,
        differentiable: bool,
    ) -> None:
        for name, value, refused in (("foreach", foreach, True), ("fused", fused, False)):
            if value is refused:
                raise ValueError(
                    f"{name}: expected None or {not refused}, got {value}: a step is one fused pass"
                )
        if differentiable:
            raise ValueError("differentiable: expected False, got True: steps leave no graph")
        if max_grad_norm is not None:
            max_grad_norm = check_number("max_grad_norm", max_grad_norm, 0.0)
        self.max_grad_norm = max_grad_norm
        self.backend = backend
        self.grad_norm = None
        self._forget()
        check_params(self.param_groups, self.backend)

    def __getstate__(self) -> dict[str, Any]:
        own = {name: self.__dict__[name] for name in ("max_grad_norm", "backend")}
        return {**super().__getstate__(), **own, "grad_norm": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim. Options that the constructor refuses are refused here, too."""
        given = param_group if isinstance(param_group, dict) else {}
        for name, refused in _REFUSED.items():
            if given.get(name) is refused:
                raise ValueError(
                    f"params: expected groups with {name}={not refused}, got {refused}"
                )
        super().add_param_group(param_group)
        if hasattr(self, "_sorted"):  # not while torch's constructor runs
            try:
                check_params(self.param_groups, self.backend)
            except (TypeError, ValueError, NotImplementedError):
                del self.param_groups[-1]
                raise

    @untraced
    def step(self, closure: Callable[[], Any] | None = None, *, num_steps: int = 1) -> Any:
        """`num_steps` consecutive updates with the gradients in `.grad`, in one pass: parameters,
        gradients and state are read once and written once.

        Equivalent to: `for _ in range(num_steps): step()`. A wrapper whose own step takes no
        num_steps hands over ours: with accelerate `wrapped.optimizer.step(num_steps=k)`, called
        where its `sync_gradients` says so. Under torch.compile a step runs outside the graph.

        Args:
            closure: as in torch.optim; evaluated once.
            num_steps: 1 <= k <= 2**24. torch's step counter is a float32, which counts so far.
        Returns:
            The closure's value, or None.
        Raises:
            TypeError, ValueError: a sparse or complex gradient, or one that lies in another
                parameter of its group (in one of an earlier group: read once that is updated);
                num_steps out of range, by name. Parameters and state are as before then.

        >>> import hullkit, torch
        >>> p = torch.nn.Parameter(torch.ones(2)); p.grad = torch.ones(2)
        >>> hullkit.optim.SGD([p], lr=0.1).step(num_steps=2)
        >>> p.data
        tensor([0.8000, 0.8000])
        """
        if watched(self):
            hooked = torch.optim.Optimizer.profile_hook_step(type(self)._step)
            return hooked(self, closure, num_steps=num_steps)
        return self._step(closure, num_steps=num_steps)

    # torch wraps every optimizer's step for its hooks and profiler; that costs more than ours. So
    # it is told that this is done, and it is, where anybody looks.
    step.hooked = True  # type: ignore[attr-defined]

    def _step(self, closure: Callable[[], Any] | None = None, *, num_steps: int = 1) -> Any:
        num_steps = check_int("num_steps", num_steps, 1, MAX_NUM_STEPS)
        loss = None
        if closure is not None:
            if not callable(closure):
                raise TypeError(
                    f"closure: expected a callable or None, got {type(closure).__name__}; "
                    "num_steps is given by name"
                )
            with torch.enable_grad():
                loss = closure()
        self._forget_if_replaced()
        launches: list[Launch] = []
        checked = False
        for index, group in enumerate(self.param_groups):
            params = group["params"]
            if type(params) is not list:
                params = list(params)
            made = self._sorted.get((index, self._variant(group)))
            own = None
            if made is not None and made.holds(params):
                own = made.launches(group, params, of_gradients=True)
            if own is None:
                if not checked:
                    self._check_gradients({p: p.grad for p in self._params()})
                    checked = True
                own = self._launches(index, group, params, [param.grad for param in params])
            launches += own
        self._settle_if_changed()
        self._run(launches, num_steps)
        return loss

    @untraced
    def step_with(self, grads: Mapping[Tensor, Tensor], *, num_steps: int = 1) -> None:
        """:meth:`step` with these gradients in place of `.grad`. Hooks of steps run here as well.

        Args:
            grads: for each parameter to update its gradient, of the parameter's shape and device
                and any supported dtype: float32 sums for half-precision parameters, say.

        Raises: as `step`; TypeError: no mapping; ValueError: a gradient of something else.
        """
        if watched(self):
            hooked = torch.optim.Optimizer.profile_hook_step(type(self)._step_with)
            hooked(self, grads, num_steps=num_steps)
        else:
            self._step_with(grads, num_steps=num_steps)
        self._opt_called = True  # what torch's schedulers look for

    def _step_with(self, grads: Mapping[Tensor, Tensor], *, num_steps: int = 1) -> None:
        num_steps = check_int("num_steps", num_steps, 1, MAX_NUM_STEPS)
        check_mapping(grads)
        given = [[grads.get(p) for p in group["params"]] for group in self.param_groups]
        if sum(grad is not None for own in given for grad in own) < len(grads):
            check_keys(grads, self._params())
        self._forget_if_replaced()
        launches: list[Launch] = []
        if any((i, self._variant(g)) not in self._sorted for i, g in enumerate(self.param_groups)):
            self._check_gradients(grads)
        for index, (group, own) in enumerate(zip(self.param_groups, given, strict=True)):
            launches += self._launches(index, group, group["params"], own)
        self._settle_if_changed()
        self._run(launches, num_steps)

    def reset(self) -> None:
        """Forget all state, as if no step had been made; the memory is given back."""
        self.state.clear()
        self._forget()

    def _check_gradients(self, grads: Mapping[Tensor, Tensor | None]) -> None:
        """Before state is made for some of them, which a step that fails would leave behind."""
        for param in self._params():
            grad = grads.get(param)
            if grad is not None:
                check_grad(param, grad)

    def _run(self, launches: list[Launch], num_steps: int) -> None:
        try:
            ready = [(launch.bucket, self._record(launch)) for launch in launches]
            if self.max_grad_norm is not None and ready:
                self._clip(ready, self.max_grad_norm)
        except BaseException:
            self._restore(launch.bucket for launch in launches)
            raise
        if len(ready) > 1 or any(bucket.before for bucket, _ in ready):
            uninterrupted(lambda: self._update(ready, num_steps))
        else:
            self._update(ready, num_steps)

    def _update(self, ready: list[tuple[Bucket, Tensor]], num_steps: int) -> None:
        for bucket, record in ready:
            self._kernel(bucket, record, num_steps)
            if bucket.before:
                bucket.launched()
            torch.autograd.graph.increment_version(bucket.params)

    def _record(self, launch: Launch) -> Tensor:
        group, bucket, addresses, _ = launch
        lr = group["lr"]
        on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
        options = self._options(group, _ON_DEVICE if on_device else float(lr))
        if self.max_grad_norm is not None:
            options = options._replace(factor=_ON_DEVICE)
        if options != bucket.options:  # groups may be written to at any time
            check_options(group)
            bucket.options = options
        record = bucket.table.record(addresses, options, self._seed())
        if on_device:
            record.view(torch.float64)[LR].copy_(lr.reshape(()))
        return record

    def _clip(self, ready: list[tuple[Bucket, Tensor]], max_grad_norm: float) -> None:
        """Sets the factor that takes the norm of all gradients together to max_grad_norm."""
        sums = [
            _kernels.squares(bucket.table, record, bucket.dtypes[1]).sum(dtype=torch.float64)
            for bucket, record in ready
        ]
        self.grad_norm = torch.stack([total.to(sums[0].device) for total in sums]).sum().sqrt()
        factor = (max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
        for _, record in ready:
            record.view(torch.float64)[FACTOR].copy_(factor)

    @untraced
    def update_in_backward(self, *, num_steps: int = 1) -> AbstractContextManager[None]:
        """Inside the with-block, `loss.backward()` updates a parameter `num_steps` times as soon
        as its gradient is complete, and frees the gradient: all of them together never exist.

            with optimizer.update_in_backward(num_steps=2):
                loss.backward()

        Equivalent to: `loss.backward(); step(num_steps=num_steps); zero_grad()`, to the same bits.
        A tied parameter is updated once, after all its uses. One backward pass for a with-block: a
        second gradient for a parameter already updated (another backward, reentrant checkpointing)
        is an error; parameters updated until then stay so.

        Parameters are those of the groups as the block begins, if they require gradients then. One
        added or unfrozen inside gets no update and keeps its `.grad`. A loss that depends on a
        weight through `w.detach()` as well may fail in backward, where `step` works: autograd finds
        the weight updated before its last use. Not for DistributedDataParallel, nor any wrapper
        that sums gradients over ranks: it does so after the update.

        The with-block counts as one step. Pre-step hooks run on entry, before any gradient exists;
        post-step hooks at its end, with no gradient left, unless it raised.

        Raises:
            ValueError: on entry, with max_grad_norm (the norm is known only when all gradients
                are), or if a `.grad` is left from before.
            RuntimeError: from backward, at a second gradient for one parameter. At the end, if an
                updated parameter has a `.grad` again: DistributedDataParallel leaves one.

        >>> import hullkit, torch
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> with hullkit.optim.SGD([p], lr=0.1).update_in_backward(num_steps=2):
        ...     p.sum().backward()
        >>> p.data, p.grad
        (tensor([0.8000, 0.8000]), None)
        """
        return update_in_backward(self, num_steps)
