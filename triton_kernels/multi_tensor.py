# SPDX-License-Identifier: Apache-2.0
"""Shared by the multi-tensor kernels: which part of which tensor a program works on.

A list of T tensors is a table on the device, and what changes from call to call is a record: see
`hullkit.optim._record`, whose fields have their places here by name. One launch covers all tensors:
`chunks` [programs, 2] int32 names each program's row of the table and its chunk of that tensor.
"""

from typing import Any

import triton
import triton.language as tl

from ..optim import _record
from ..optim._record import TensorRow

BLOCK_SIZE = 512  # elements a program holds in registers at a time
CHUNK_SIZE = 16 * BLOCK_SIZE  # elements a program works through, block by block
NUM_WARPS = 4


def place(layout: Any, field: str) -> tl.constexpr:
    """Where a field lies, in words from the beginning of its record or row."""
    return tl.constexpr(layout._fields.index(field))


LIMIT = tl.constexpr(_record.LIMIT)
BROKEN = tl.constexpr(_record.BROKEN)
SEED = tl.constexpr(_record.SEED)
HEAD = tl.constexpr(_record.HEAD)
COLUMNS = tl.constexpr(len(TensorRow._fields))
PARAM_AT = place(TensorRow, "param")
STATE1_AT = place(TensorRow, "state1")
STATE2_AT = place(TensorRow, "state2")
STEP_AT = place(TensorRow, "step")
NUMEL = place(TensorRow, "numel")
FLAGS = place(TensorRow, "flags")
ALIGNMENT = tl.constexpr(16)  # bytes of one vector access


@triton.jit
def locate(table, chunks, CHUNK: tl.constexpr):
    """This program's row, the row's address, its first element and the end of its chunk."""
    program = tl.program_id(0)
    row = tl.load(chunks + 2 * program).to(tl.int64)
    start = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
    entry = table + row * COLUMNS
    return row, entry, start, tl.minimum(tl.load(entry + NUMEL), start + CHUNK)


@triton.jit
def whole_blocks(addresses, start, end, BLOCK: tl.constexpr):
    """How many blocks of the chunk can be read and written in vectors, the rest one by one.

    addresses: all tensors' addresses, or-ed together.
    """
    return tl.where(addresses % ALIGNMENT == 0, (end - start) // BLOCK, 0)


@triton.jit
def option(record, PLACE: tl.constexpr):
    return tl.load(record + PLACE).to(tl.float64, bitcast=True)


@triton.jit
def gradient(record, row):
    return tl.load(record + HEAD + row)


@triton.jit
def updates(record, num_steps):
    """num_steps, or less: a captured launch obeys the limit in its record."""
    return tl.minimum(num_steps, tl.load(record + LIMIT)).to(tl.int32)


@triton.jit
def pointers(address, offsets, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    """[BLOCK] pointers. WHOLE promises a 16-byte boundary, which makes accesses vectors."""
    base = address.to(tl.pointer_type(DTYPE))
    if WHOLE:
        base = tl.multiple_of(base, ALIGNMENT)
    return base + offsets


@triton.jit
def fetch(address, first, offsets, end, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    """[BLOCK] elements as they lie in memory; from `end` on, 0. WHOLE: the block, which begins at
    `first`, lies before `end` or behind it."""
    at = pointers(address, offsets, DTYPE, WHOLE)
    if WHOLE:
        return tl.load(at, mask=tl.zeros_like(offsets) + first < end, other=0)
    return tl.load(at, mask=offsets < end, other=0)


@triton.jit
def read(address, offsets, end, DTYPE: tl.constexpr, MATH: tl.constexpr, WHOLE: tl.constexpr):
    """[BLOCK] elements in the arithmetic type; unless WHOLE, 0 from `end` on."""
    at = pointers(address, offsets, DTYPE, WHOLE)
    if WHOLE:
        return tl.load(at).to(MATH)
    return tl.load(at, mask=offsets < end, other=0).to(MATH)


@triton.jit
def write(address, offsets, end, values, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    at = pointers(address, offsets, DTYPE, WHOLE)
    if WHOLE:
        tl.store(at, values.to(DTYPE))
    else:
        tl.store(at, values.to(DTYPE), mask=offsets < end)


@triton.jit
def mix(x):
    """A 32-bit hash with good avalanche."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def noise_key(seed, salt, step, start):
    """The key of one tensor's noise at one step. start: the chunk's first element, whose upper half
    counts."""
    key = mix(seed.to(tl.uint32) + 0x9E3779B9)
    key = mix((key ^ (seed >> 32).to(tl.uint32)) + 0x9E3779B9)
    key = mix((key ^ salt.to(tl.uint32)) + 0x9E3779B9)
    key = mix((key ^ step.to(tl.uint32)) + 0x9E3779B9)
    return mix((key ^ (start >> 32).to(tl.uint32)) + 0x9E3779B9)


@triton.jit
def noise(offsets, key):
    """32 random bits for each element: a function of the counter and the key. Rounding asks for
    bits without bias; a cryptographer's generator would take longer than the memory."""
    return mix(offsets.to(tl.uint32) ^ key)


@triton.jit
def round_bfloat16(values, bits):
    """float32 to bfloat16, away from 0 with the probability of the part cut off, whose 16 bits are
    compared with these. Infinity and NaN stay."""
    word = values.to(tl.uint32, bitcast=True) + tl.where(values == values, bits, 0).to(tl.uint32)
    return (word >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def round_float16(values, bits):
    """The same to float16; 24 random bits. It keeps 10 bits of 23, and below 2^-14 multiples of
    2^-24. What does not fit is rounded as ever: to infinity."""
    word = values.to(tl.uint32, bitcast=True)
    large = (word & 0x7FFFFFFF) >= 0x477FE000
    kept = tl.where(large, word, (word + (bits >> 11)) & 0xFFFFE000).to(tl.uint32)
    steps = tl.floor(tl.abs(values) * 16777216.0 + bits.to(tl.float32) * (1.0 / 16777216.0))
    steps *= 1.0 / 16777216.0
    small = tl.where(values < 0, -steps, steps)
    is_small = tl.abs(values) < 6.103515625e-05
    return tl.where(is_small, small, kept.to(tl.float32, bitcast=True)).to(tl.float16)


@triton.jit
def round_param(values, random, DTYPE: tl.constexpr):
    """With the upper bits of 32 random ones."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        rounded = round_bfloat16(values, random >> 16)
    else:
        rounded = round_float16(values, random >> 8)
    return rounded


@triton.jit
def round_moments(first, second, random):
    """To bfloat16, with 8 random bits each, the lower ones."""
    return (
        round_bfloat16(first, (random << 8) & 0xFF00 | 0x80),
        round_bfloat16(second, random & 0xFF00 | 0x80),
    )
