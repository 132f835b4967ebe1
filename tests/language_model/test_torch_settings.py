# SPDX-License-Identifier: Apache-2.0
"""What a context manager leaves behind whose `__exit__` is cut short."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hullkit.language_model.product_settings import matmul_precision, open_blocks
from hullkit.language_model.replaced_globals import Replacement, replaced_globals
from hullkit.language_model.torch_settings import TorchSettings, autocast_depth
from hullkit.native.torch_private import saved_tensors_hooks
from torch.autograd.graph import saved_tensors_hooks as hooks

TELLS_HOOKS = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")


def same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def test_what_is_left_open_ends() -> None:
    space: dict[str, Any] = {"f": len}
    settings = TorchSettings()
    left: list[Any] = [
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
        matmul_precision("tf32"),
        replaced_globals([Replacement(space, "f", lambda own, x: own(x) + 1)]),
        *([hooks(same, same)] if TELLS_HOOKS else []),
    ]
    for block in left:
        block.__enter__()
    assert space["f"]("a") == 2
    for _ in range(2):
        settings.put_back()
        assert torch.is_grad_enabled()
        assert autocast_depth() == 0
        assert not open_blocks()
        assert space["f"] is len
        assert saved_tensors_hooks() is None


@pytest.mark.skipif(not TELLS_HOOKS, reason="an old torch")
def test_what_was_open_before_stays() -> None:
    space: dict[str, Any] = {"f": len}
    outer = [Replacement(space, "f", lambda own, x: own(x) + 1)]
    inner = [Replacement(space, "f", lambda own, x: own(x) + 2)]
    with matmul_precision("float32"), replaced_globals(outer), hooks(same, same):
        settings = TorchSettings()
        kept = [replaced_globals(inner), hooks(same, torch.neg)]
        for block in kept:
            block.__enter__()
        assert space["f"]("a") == 3
        settings.put_back()
        assert space["f"]("a") == 2
        assert saved_tensors_hooks() == (same, same)
        assert len(open_blocks()) == 1
    assert space["f"] is len
    assert saved_tensors_hooks() is None
