# SPDX-License-Identifier: Apache-2.0
"""How an optimizer's tables of addresses are made, kept and dropped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._tensors import uses_triton
from ._buckets import (
    Bucket,
    CheckedParams,
    Launch,
    Params,
    SortedBuckets,
    check_grad,
    check_params,
    params_of,
)
from ._layouts import StateLayouts, address, state_layouts, torch_swaps
from ._record import TensorRow, flags_of
from ._state import StateBefore, are_among, own_values, restore_state, state_before
from ._tensor_table import TensorTable


class TabledOptimizer(torch.optim.Optimizer):
    """A torch optimizer that keeps tables of where its parameters and state lie."""

    backend: str | None
    _checked: CheckedParams | None = None  # by the step or block that runs, once it has to

    # A subclass defines its state.

    def _state_of(self, group: dict[str, Any], param: Tensor) -> tuple[list[Tensor | None], bool]:
        """[state 1, state 2, step counter], made if missing; True if state 1 is yet to be set."""
        raise NotImplementedError

    def _state_dtype(self, param: Tensor) -> torch.dtype:
        return param.dtype

    def _salt(self, place: int, param: Tensor) -> int:
        """32 bits that make the noise of this parameter its own. place: its number, as in a
        state_dict."""
        return place

    def _variant(self, group: dict[str, Any]) -> Any:
        """The part of a group that decides which state the tables hold."""
        return None

    def _params(self) -> Params:
        return params_of(self.param_groups)

    def _forget(self) -> None:
        """Tables hold addresses, and are made anew once a tensor may have been replaced."""
        self._retire(*self.__dict__.get("_sorted", {}).values())
        self._sorted: dict[Any, SortedBuckets] = {}
        self._states: StateLayouts | None = None  # of all state; None: `_settle` is to look at it
        self._num_groups = 0  # as `_settle` saw them
        self._swapping = torch_swaps()

    def _retire(self, *outdated: SortedBuckets) -> None:
        """Keep the tables that a captured graph reads at its next replay."""
        kept = [sort for sort in outdated if any(b.table.captured for b in sort.buckets)]
        self._replayed: list[SortedBuckets] = [*self.__dict__.get("_replayed", ()), *kept]

    def _forget_if_replaced(self) -> None:
        """Forget the tables if the state is not, or lies not where, it was when they were made."""
        self._checked = None  # what a user has done since is not known
        if self._states is None:  # a step or block ended too early to settle
            self._restore(b for made in self._sorted.values() for b in made.buckets if b.fresh)
            self._forget()
        elif self._swapping != torch_swaps() or not self._states.unmoved(self.state):
            self._forget()

    def _settle_if_changed(self) -> None:
        if self._states is None or len(self.param_groups) != self._num_groups:
            self._settle()

    def _settle(self) -> None:
        """After tables were made: once for all of them, as it looks at everything."""
        self._drop_absent()
        self._states = state_layouts(self.state)
        self._num_groups = len(self.param_groups)

    def _drop_absent(self) -> None:
        """Tables keep parameters alive, which may have left the groups."""
        present = set(map(id, self._params()))
        absent = [key for key, made in self._sorted.items() if not made.is_of_only(present)]
        self._retire(*map(self._sorted.pop, absent))

    def _launches(
        self, key: Any, group: dict[str, Any], params: Params, grads: Sequence[Tensor | None]
    ) -> list[Launch]:
        key = (key, self._variant(group))
        pairs = [(p, grad) for p, grad in zip(params, grads, strict=True) if grad is not None]
        if not pairs:
            if key in self._sorted and not self._sorted[key].is_of_only(set(map(id, params))):
                self._drop_absent()
            return []
        present, given = [p for p, _ in pairs], [grad for _, grad in pairs]
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
            self._restore(b for made in self._sorted.values() for b in made.buckets)
            raise
        assert launches is not None
        return launches

    def _sort(
        self, key: Any, group: dict[str, Any], params: Params, grads: list[Tensor]
    ) -> SortedBuckets:
        """Buckets for these parameters. State is made where it is missing; an error leaves none."""
        before: StateBefore = [(param, state_before(self.state, param)) for param in params]
        try:
            return self._sort_anew(key, group, params, grads, before)
        except BaseException:  # during a capture, say, state was made and not written
            restore_state(self.state, before)
            raise

    def _sort_anew(
        self,
        key: Any,
        group: dict[str, Any],
        params: Params,
        grads: list[Tensor],
        before: StateBefore,
    ) -> SortedBuckets:
        if self._checked is None or not self._checked.holds(params):
            # torch may have moved or retyped them since the last step.
            check_params(self.param_groups, self.backend)
            # A block updates what was in the groups as it began, which a hook may have taken out.
            every = params_of([*self.param_groups, {"params": params}])
            self._checked = CheckedParams(every, self._salt)
        places: dict[Any, list[int]] = {}  # by kind
        for place, (param, grad) in enumerate(zip(params, grads, strict=True)):
            check_grad(param, grad)
            places.setdefault((param.device, param.dtype, grad.dtype), []).append(place)
        buckets, replaced = [], False
        for (device, dtype, grad_dtype), chosen in places.items():
            rows, any_fresh = [], False
            for place in chosen:
                param = params[place]
                had = own_values(self.state, param)
                states, fresh = self._state_of(group, param)
                replaced |= not are_among(had, own_values(self.state, param))
                of_states = (0 if state is None else address("state", state) for state in states)
                state1, state2, step = of_states
                any_fresh |= fresh
                flags = flags_of(self._checked.salts[id(param)], fresh)
                at, numel = address("params", param), param.numel()
                rows.append(TensorRow(at, state1, state2, step, numel, flags))
            table = TensorTable(rows, device, uses_triton("params", device, self.backend))
            own = [params[place] for place in chosen]
            dtypes = (dtype, grad_dtype, self._state_dtype(own[0]))
            buckets.append(Bucket(own, dtypes, table, any_fresh, [before[p] for p in chosen]))
        made = SortedBuckets(params, buckets, list(places.values()))
        outdated = [key] if key in self._sorted else []
        if replaced:  # a block has a table of each parameter, and a step one of all
            ids = set(map(id, params))
            outdated = [k for k, old in self._sorted.items() if old.is_of_any(ids)]
        self._retire(*map(self._sorted.pop, outdated))
        self._sorted[key] = made
        self._states = None
        return made

    def _restore(self, buckets: Iterable[Bucket]) -> None:
        """Takes state back that was made for updates which did not come about. Of fresh state only
        the tables know that it is yet to be set."""
        before = [entry for bucket in buckets for entry in bucket.before]
        restore_state(self.state, before)
        if before:
            self._forget()
