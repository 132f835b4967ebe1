# SPDX-License-Identifier: Apache-2.0
"""The base of the fused optimizers: buckets of tensors, k updates in a pass, update in backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .._checks import check_int, check_number
from ..native.kernels import uninterrupted
from . import _kernels
from ._buckets import Bucket, Launch, Params, SortedBuckets, check_grad, check_keys
from ._in_backward import update_in_backward
from ._layouts import address, state_layouts
from ._record import FACTOR, LR, MAX_NUM_STEPS, AdamOptions, SGDOptions, TensorRow, flags_of
from ._tensor_table import DTYPES, TensorTable, check_disjoint, is_dense, uses_triton
from ._watched import untraced, watched

_ON_DEVICE = math.nan  # an option that is filled in on the device

Options = AdamOptions | SGDOptions

# Options of torch's that ask for another way of computing a step, or for other steps.
_REFUSED = {"foreach": True, "fused": False, "differentiable": True, "amsgrad": True}


class FusedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose `step(num_steps=k)` makes k updates in one pass over memory."""

    max_grad_norm: float | None
    backend: str | None
    grad_norm: Tensor | None  # global norm of the latest step's gradients, if it clipped

    # A subclass defines its state, its options and its kernel.

    def _state_of(self, group: dict[str, Any], param: Tensor) -> tuple[list[Tensor | None], bool]:
        """[state 1, state 2, step counter], made if missing; True if state 1 is yet to be set."""
        raise NotImplementedError

    def _state_dtype(self, param: Tensor) -> torch.dtype:
        return param.dtype

    def _salt(self, place: int, param: Tensor) -> int:
        """32 bits that make the noise of this parameter its own. place: its number, as in a
        state_dict."""
        return place

    def _seed(self) -> int:
        return 0

    def _options(self, group: dict[str, Any], lr: float) -> Options:
        raise NotImplementedError

    def _variant(self, group: dict[str, Any]) -> Any:
        """The part of a group that decides which state the tables hold."""
        return None

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
        self._check_params()

    def _forget(self) -> None:
        """Tables hold addresses, and are made anew once a tensor may have been replaced."""
        self._retire(*self.__dict__.get("_sorted", {}).values())
        self._sorted: dict[Any, SortedBuckets] = {}
        self._states = state_layouts({})

    def _retire(self, *outdated: SortedBuckets) -> None:
        """Keep the tables that a captured graph reads at its next replay."""
        kept = [sort for sort in outdated if any(b.table.captured for b in sort.buckets)]
        self._replayed: list[SortedBuckets] = [*self.__dict__.get("_replayed", ()), *kept]

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
                self._check_params()
            except (TypeError, ValueError, NotImplementedError):
                del self.param_groups[-1]
                raise

    def _check_params(self) -> None:
        for param in self._params():
            name = f"params: parameter of shape {tuple(param.shape)}"
            if param.dtype not in DTYPES:
                raise TypeError(
                    f"{name}: expected dtype float64, float32, float16 or bfloat16, "
                    f"got {param.dtype}"
                )
            if param.layout is not torch.strided or not is_dense(param):
                got = f"strides {param.stride()}" if param.layout is torch.strided else param.layout
                raise ValueError(f"{name}: expected elements side by side in memory, got {got}")
            uses_triton("params", param.device, self.backend)
        if len(self._params()) < sum(len(group["params"]) for group in self.param_groups):
            raise ValueError("params: expected every parameter once, got one twice")
        check_disjoint("params", self._params())

    def _params(self) -> Params:
        """Every parameter once, in the order of the groups."""
        return list({id(p): p for g in self.param_groups for p in g["params"]}.values())

    @untraced
    def step(self, closure: Callable[[], Any] | None = None, *, num_steps: int = 1) -> Any:
        """`num_steps` consecutive updates with the gradients in `.grad`, in one pass: parameters,
        gradients and state are read once and written once.

        Equivalent to: `for _ in range(num_steps): step()`. A wrapper whose own step takes no
        num_steps hands over ours: with accelerate `wrapped.optimizer.step(num_steps=k)`, called
        where its `sync_gradients` says so. Under torch.compile a step runs outside the graph.

        Args:
            closure: as in torch.optim; evaluated once.
            num_steps: 1 <= k <= 2**24: so far torch's step counter, a float32, counts.
        Returns:
            The closure's value, or None.
        Raises:
            TypeError, ValueError: a sparse or complex gradient; num_steps out of range, by name.

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
        self._run(launches, num_steps)
        return loss

    @untraced
    def step_with(self, grads: Mapping[Tensor, Tensor], *, num_steps: int = 1) -> None:
        """:meth:`step` with these gradients in place of `.grad`. Hooks of steps run here as well.

        Args:
            grads: for each parameter to update its gradient, of the parameter's shape and device
                and any supported dtype: float32 sums for half-precision parameters, say.

        Raises: as `step`; ValueError: a gradient of something else.
        """
        if watched(self):
            hooked = torch.optim.Optimizer.profile_hook_step(type(self)._step_with)
            hooked(self, grads, num_steps=num_steps)
        else:
            self._step_with(grads, num_steps=num_steps)
        self._opt_called = True  # what torch's schedulers look for

    def _step_with(self, grads: Mapping[Tensor, Tensor], *, num_steps: int = 1) -> None:
        num_steps = check_int("num_steps", num_steps, 1, MAX_NUM_STEPS)
        given = [[grads.get(p) for p in group["params"]] for group in self.param_groups]
        if sum(grad is not None for own in given for grad in own) < len(grads):
            check_keys(grads, self._params())
        self._forget_if_replaced()
        launches: list[Launch] = []
        if any((i, self._variant(g)) not in self._sorted for i, g in enumerate(self.param_groups)):
            self._check_gradients(grads)
        for index, (group, own) in enumerate(zip(self.param_groups, given, strict=True)):
            launches += self._launches(index, group, group["params"], own)
        self._run(launches, num_steps)

    def reset(self) -> None:
        """Forget all state, as if no step had been made; the memory is given back."""
        self.state.clear()
        self._forget()

    def _forget_if_replaced(self) -> None:
        """Forget the tables if the state is not, or lies not where, it was when they were made."""
        if not self._states.unmoved(self.state):
            self._forget()

    def _check_gradients(self, grads: Mapping[Tensor, Tensor | None]) -> None:
        """Before state is made for some of them, which a step that fails would leave behind."""
        for param in self._params():
            grad = grads.get(param)
            if grad is not None:
                check_grad(param, grad)

    def _launches(
        self, key: Any, group: dict[str, Any], params: Params, grads: Sequence[Tensor | None]
    ) -> list[Launch]:
        pairs = [(p, grad) for p, grad in zip(params, grads, strict=True) if grad is not None]
        if not pairs:
            return []
        present, given = [p for p, _ in pairs], [grad for _, grad in pairs]
        key = (key, self._variant(group))
        try:
            made = self._sorted.get(key)
            if made is None or not made.holds(present):
                made = self._sort(key, group, present, given)
            launches = made.launches(group, given)
            if launches is None:
                launches = made.first_launches(group, given)
            if launches is None:  # gradients of other dtypes than last time
                launches = self._sort(key, group, present, given).first_launches(group, given)
        except BaseException:  # other groups may have new state, too
            self._drop_fresh(b for made in self._sorted.values() for b in made.buckets)
            raise
        assert launches is not None
        return launches

    def _sort(
        self, key: Any, group: dict[str, Any], params: Params, grads: list[Tensor]
    ) -> SortedBuckets:
        """Buckets for these parameters. State is made where it is missing; an error leaves none."""
        known = [param in self.state for param in params]
        try:
            return self._sort_anew(key, group, params, grads)
        except BaseException:  # during a capture, say, state was made and not written
            for param, had in zip(params, known, strict=True):
                if not had:
                    self.state.pop(param, None)
            raise

    def _sort_anew(
        self, key: Any, group: dict[str, Any], params: Params, grads: list[Tensor]
    ) -> SortedBuckets:
        self._check_params()  # torch may have moved or retyped them since
        salts = {id(p): self._salt(place, p) for place, p in enumerate(self._params())}
        places: dict[Any, list[int]] = {}  # by kind
        for place, (param, grad) in enumerate(zip(params, grads, strict=True)):
            check_grad(param, grad)
            places.setdefault((param.device, param.dtype, grad.dtype), []).append(place)
        buckets = []
        for (device, dtype, grad_dtype), chosen in places.items():
            rows, any_fresh = [], False
            for place in chosen:
                param = params[place]
                states, fresh = self._state_of(group, param)
                of_states = (0 if state is None else address("state", state) for state in states)
                state1, state2, step = of_states
                any_fresh |= fresh
                flags = flags_of(salts[id(param)], fresh)
                at, numel = address("params", param), param.numel()
                rows.append(TensorRow(at, state1, state2, step, numel, flags))
            table = TensorTable(rows, device, uses_triton("params", device, self.backend))
            own = [params[place] for place in chosen]
            dtypes = (dtype, grad_dtype, self._state_dtype(own[0]))
            buckets.append(Bucket(own, dtypes, table, any_fresh))
        made = SortedBuckets(params, buckets, list(places.values()))
        if key in self._sorted:
            self._retire(self._sorted[key])
        self._sorted[key] = made
        self._states = state_layouts(self.state)
        return made

    def _run(self, launches: list[Launch], num_steps: int) -> None:
        try:
            ready = [(launch.bucket, self._record(launch)) for launch in launches]
            if self.max_grad_norm is not None and ready:
                self._clip(ready, self.max_grad_norm)
        except BaseException:
            self._drop_fresh(launch.bucket for launch in launches)
            raise
        if len(ready) > 1 or any(bucket.fresh for bucket, _ in ready):
            uninterrupted(lambda: self._update(ready, num_steps))
        else:
            self._update(ready, num_steps)

    def _drop_fresh(self, buckets: Iterable[Bucket]) -> None:
        """Takes state back that was made for updates which did not come about: only the tables know
        that it is yet to be set."""
        fresh = [param for bucket in buckets for param in bucket.fresh_params()]
        for param in fresh:
            self.state.pop(param, None)
        if fresh:
            self._forget()

    def _update(self, ready: list[tuple[Bucket, Tensor]], num_steps: int) -> None:
        for bucket, record in ready:
            self._kernel(bucket, record, num_steps)
            if bucket.fresh:
                bucket.table.set_no_longer_fresh()
                bucket.fresh = False
            torch.autograd.graph.increment_version(bucket.params)

    def _record(self, launch: Launch) -> Tensor:
        group, bucket, addresses, _ = launch
        lr = group["lr"]
        on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
        options = self._options(group, _ON_DEVICE if on_device else float(lr))
        if self.max_grad_norm is not None:
            options = options._replace(factor=_ON_DEVICE)
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
        """Inside the with-block, `loss.backward()` updates every parameter `num_steps` times as
        soon as its gradient is complete, and frees the gradient: all of them together never exist.

            with optimizer.update_in_backward(num_steps=2):
                loss.backward()

        Equivalent to: `loss.backward(); step(num_steps=num_steps); zero_grad()`, to the same bits.
        A tied parameter is updated once, after all its uses. One backward pass for a with-block: a
        second gradient for a parameter already updated (another backward, reentrant checkpointing)
        is an error; parameters updated until then stay so.

        The with-block counts as one step. Pre-step hooks run on entry, before any gradient exists;
        post-step hooks at its end, with no gradient left, unless it raised.

        Raises:
            ValueError: on entry, with max_grad_norm (the norm is known only when all gradients
                are), or if a `.grad` is left from before.
            RuntimeError: from backward, at a second gradient for one parameter.

        >>> import hullkit, torch
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> with hullkit.optim.SGD([p], lr=0.1).update_in_backward(num_steps=2):
        ...     p.sum().backward()
        >>> p.data, p.grad
        (tensor([0.8000, 0.8000]), None)
        """
        return update_in_backward(self, num_steps)
