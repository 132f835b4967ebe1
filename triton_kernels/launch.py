# SPDX-License-Identifier: Apache-2.0
"""The first launch of a kernel, which compiles it."""

import math
from typing import Any

import torch
import triton.language as tl

from ..optim._record import COEFFICIENT_ROWS
from . import add, attention, cross_entropy, gate, low_rank, norm, rotary, stacked_adam
from .accumulate import accumulate_kernel, squares_kernel
from .adam import adam_coefficients_kernel, adam_kernel, restore_kernel
from .dependent_launch import starts_early
from .multi_tensor import BLOCK_SIZE, CHUNK_SIZE, NUM_WARPS
from .sgd import sgd_kernel

_CHUNKS = {"BLOCK": BLOCK_SIZE, "CHUNK": CHUNK_SIZE}
_ROWS = {"BLOCK": cross_entropy.BLOCK_SIZE}
_TILES = {"ROWS": low_rank.ROWS, "COLUMNS": low_rank.COLUMNS}
KERNELS = {
    "adam_coefficients": (adam_coefficients_kernel, {"BLOCK": COEFFICIENT_ROWS}),
    "adam": (adam_kernel, _CHUNKS),
    "restore": (restore_kernel, _CHUNKS),
    "sgd": (sgd_kernel, _CHUNKS),
    "accumulate": (accumulate_kernel, _CHUNKS),
    "squares": (squares_kernel, _CHUNKS),
    "cross_entropy": (cross_entropy.cross_entropy_kernel, _ROWS),
    "cross_entropy_and_gradient": (
        cross_entropy.cross_entropy_kernel,
        {"BLOCK": cross_entropy.LARGE_BLOCK_SIZE},
    ),
    "cross_entropy_gradient": (cross_entropy.cross_entropy_gradient_kernel, _ROWS),
    "rescale": (cross_entropy.rescale_kernel, _ROWS),
    "norm": (norm.norm_kernel, {}),
    "norm_gradient": (norm.norm_gradient_kernel, {}),
    "column_sums": (norm.column_sums_kernel, {"ROWS": norm.SUM_ROWS, "COLUMNS": norm.SUM_COLUMNS}),
    "add": (add.add_kernel, {"BLOCK": add.BLOCK_SIZE}),
    "gate": (gate.gate_kernel, {"BLOCK": gate.BLOCK_SIZE}),
    "gate_gradient": (gate.gate_gradient_kernel, {"BLOCK": gate.BLOCK_SIZE}),
    "rotary": (rotary.rotary_kernel, {"PAIRS": rotary.PAIRS}),
    "low_rank_shrink": (low_rank.low_rank_shrink_kernel, _TILES),
    "low_rank_expand": (low_rank.low_rank_expand_kernel, _TILES),
    "low_rank_expand_gradient": (low_rank.low_rank_expand_gradient_kernel, _TILES),
    "low_rank_shrink_gradient": (low_rank.low_rank_shrink_gradient_kernel, _TILES),
    "low_rank_shrink_gradient_few": (
        low_rank.low_rank_shrink_gradient_kernel,
        {"ROWS": low_rank.FEW_ROWS, "COLUMNS": low_rank.FEW_COLUMNS},
    ),
    "attention": (attention.attention_kernel, {}),
    "attention_gradient": (attention.attention_gradient_kernel, {}),
    "attention_q_gradient": (attention.attention_q_gradient_kernel, {}),
    "attention_kv_gradient": (attention.attention_kv_gradient_kernel, {}),
    "stacked_adam": (
        stacked_adam.stacked_adam_kernel,
        {"BLOCK": BLOCK_SIZE, "BLOCKS": stacked_adam.BLOCKS},
    ),
}
OTHER_WARPS = {"cross_entropy_and_gradient": cross_entropy.LARGE_NUM_WARPS}  # than NUM_WARPS


def launch(
    name: str,
    programs: int | tuple[int, int],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
) -> tuple[Any, tuple[Any, ...]]:
    """Runs a kernel; returns it compiled (None from the interpreter) and all constants' values.

    programs: of the grid, on one axis or on two.
    constants: torch dtypes and flags, in the order of the kernel's arguments.
    """
    kernel, sizes = KERNELS[name]
    grid = programs if isinstance(programs, tuple) else (programs,)
    early = starts_early(kernel, math.prod(grid))
    values = {
        key: getattr(tl, str(value).removeprefix("torch."))
        if isinstance(value, torch.dtype)
        else value
        for key, value in constants.items()
    }
    values |= sizes | {"EARLY": early}
    # No fusion but the kernels' own tl.fma, so that every path through them gives the same bits.
    options = {"num_warps": OTHER_WARPS.get(name, NUM_WARPS), "enable_fp_fusion": False}
    if early:
        options["launch_pdl"] = True
    compiled = kernel[grid](*arguments, **values, **options)
    return compiled, tuple(values.values())
