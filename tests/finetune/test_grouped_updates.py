# SPDX-License-Identifier: Apache-2.0
"""The order in which updates beside a backward pass start. What they compute is tested on GPUs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hullkit.finetune.grouped_updates import GroupedUpdates
from torch import nn


class Noted(GroupedUpdates):
    """Groups of parameters, which are only told of."""

    def __init__(self, groups: list[list[nn.Parameter]]) -> None:
        self.started: list[int] = []
        self.groups: list[Any] = [SimpleNamespace(parameters=own) for own in groups]
        self._group_of = {p: g for g in self.groups for p in g.parameters}
        self._parts = []
        self.begin()

    def _start(self, group: Any) -> None:
        self.started.append([id(own) for own in self.groups].index(id(group)))

    def complete(self, parameter: nn.Parameter) -> None:
        self._note(self._group_of[parameter])


def test_groups_with_promised_factors_start_when_the_backward_pass_has_ended() -> None:
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(6)]
    updates = Noted([parameters[:2], parameters[2:4], parameters[4:]])
    updates.complete(parameters[0])
    assert updates.promises(parameters[3])
    for parameter in parameters[1:4]:
        updates.complete(parameter)
    assert updates.started == [0]
    assert not updates.promises(nn.Parameter(torch.zeros(2)))  # of somebody else
    for parameter in parameters[4:]:
        updates.complete(parameter)
    assert updates.started == [0, 2]
    updates.join()
    assert updates.started == [0, 2, 1]
    updates.begin()  # the next pass has made no promise
    for parameter in parameters:
        updates.complete(parameter)
    assert updates.started == [0, 2, 1, 0, 1, 2]
