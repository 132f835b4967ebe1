# SPDX-License-Identifier: Apache-2.0
"""The order in which updates beside a backward pass start. What they compute is tested on GPUs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hullkit.finetune.grouped_updates import GroupedUpdates
from torch import Tensor, nn


class Noted(GroupedUpdates):
    """Groups of parameters, which are only told of."""

    def __init__(self, groups: list[list[nn.Parameter]], taken: set[nn.Parameter]) -> None:
        self.started: list[int] = []
        self.noted: list[tuple[Tensor, Tensor]] = []
        part = SimpleNamespace(gradients={}, note=self._write)
        self.groups: list[Any] = [
            SimpleNamespace(parameters=own, part=part, taken=[]) for own in groups
        ]
        self._taken = taken
        self._group_of = {p: g for g in self.groups for p in g.parameters}
        self._parts = []
        self.begin()

    def _start(self, group: Any) -> None:
        self.started.append([id(own) for own in self.groups].index(id(group)))

    def _write(self, parameter: Tensor, gradient: Tensor) -> None:
        self.groups[0].part.gradients[parameter] = gradient
        self.noted.append((parameter, gradient))

    def complete(self, parameter: nn.Parameter) -> None:
        self._note(self._group_of[parameter])


def test_groups_with_gradients_that_are_written_late_start_when_the_pass_has_ended() -> None:
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(6)]
    updates = Noted([parameters[:2], parameters[2:4], parameters[4:]], {*parameters[3:]})
    gradient = torch.zeros(2)
    updates.complete(parameters[0])
    assert updates.take_gradient(parameters[3], gradient)
    assert updates.noted == [(parameters[3], gradient)]
    for parameter in parameters[1:3]:
        updates.complete(parameter)
    assert updates.started == [0]
    assert not updates.take_gradient(parameters[2], gradient)  # of several layers
    assert not updates.take_gradient(nn.Parameter(torch.zeros(2)), gradient)  # of somebody else
    for parameter in parameters[4:]:
        updates.complete(parameter)
    assert updates.started == [0, 2]
    updates.join()
    assert updates.started == [0, 2, 1]
    updates.begin()  # in the next pass all are made at once
    for parameter in parameters:
        updates.complete(parameter)
    assert updates.started == [0, 2, 1, 0, 1, 2]


def test_a_gradient_that_comes_after_one_was_taken() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    updates = Noted([[parameter, nn.Parameter(torch.zeros(2))]], {parameter})
    assert updates.take_gradient(parameter, torch.zeros(2))
    updates.ready(parameter)  # autograd has none
    with pytest.raises(RuntimeError, match="expected one gradient of a parameter of shape"):
        updates.take_gradient(parameter, torch.zeros(2))
    parameter.grad = torch.zeros(2)
    with pytest.raises(RuntimeError, match="expected one gradient of a parameter of shape"):
        updates.ready(parameter)
