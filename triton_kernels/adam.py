# SPDX-License-Identifier: Apache-2.0
"""k Adam updates with one gradient: each element is read once, updated k times, written once.

Two launches: `adam_coefficients_kernel` for what an update has in common for all elements, then
`adam_kernel`. Options are AdamOptions in `record`, on the device: a change of them compiles
nothing, and a captured graph can be told. `restore_kernel` takes all updates back.

STOCHASTIC rounds half-precision parameters and their moments up or down at random in proportion.
"""

import triton
import triton.language as tl

from ..optim._record import AdamOptions
from .dependent_launch import after_previous_kernel
from .multi_tensor import (
    BROKEN,
    COLUMNS,
    FLAGS,
    PARAM_AT,
    SEED,
    STATE1_AT,
    STATE2_AT,
    STEP_AT,
    fetch,
    gradient,
    locate,
    noise,
    noise_key,
    option,
    place,
    read,
    round_moments,
    round_param,
    updates,
    whole_blocks,
    write,
)

LR = place(AdamOptions, "lr")
BETA1 = place(AdamOptions, "beta1")
BETA2 = place(AdamOptions, "beta2")
LOG2_BETA1 = place(AdamOptions, "log2_beta1")
LOG2_BETA2 = place(AdamOptions, "log2_beta2")
EPS = place(AdamOptions, "eps")
L2 = place(AdamOptions, "l2")
DECAY = place(AdamOptions, "decay")
SIGN = place(AdamOptions, "sign")
FACTOR = place(AdamOptions, "factor")

COEFFICIENTS = tl.constexpr(2)  # of one update


@triton.jit(do_not_specialize=["size", "num_steps"])
def adam_coefficients_kernel(
    table, record, size, coefficients, num_steps, MATH: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """coefficients [T, num_steps, 2], and every step counter moved on by num_steps.

    lr / bias1 * m / (sqrt(v) / root2 + eps), with root2 = sqrt(bias2) taken out of the elements'
    work: the step size lr * root2 / bias1, and eps * root2. In float64, for 1 - beta ** t cancels.
    """
    after_previous_kernel(EARLY)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < size
    step_at = tl.load(table + rows * COLUMNS + STEP_AT, mask=inside, other=0)
    step_at = step_at.to(tl.pointer_type(tl.float32))
    step = tl.load(step_at, mask=inside, other=0).to(tl.float64)
    lr = option(record, LR)
    eps = option(record, EPS)
    # Below the normal numbers of float32 the reciprocal of a root would be infinite, and 0 times it
    # NaN. An eps of 0 stays 0.
    normal = 1.1754943508222875e-38 if MATH == tl.float32 else 0.0  # noqa: SIM300
    least = tl.where(eps > 0.0, normal, 0.0)
    for i in range(updates(record, num_steps)):
        step += 1.0
        bias1 = 1.0 - tl.exp2(step * option(record, LOG2_BETA1))
        root2 = tl.sqrt(1.0 - tl.exp2(step * option(record, LOG2_BETA2)))
        at = coefficients + (rows.to(tl.int64) * num_steps + i) * COEFFICIENTS
        tl.store(at, (lr * root2 / bias1).to(MATH), mask=inside)
        tl.store(at + 1, tl.maximum(eps * root2, least).to(MATH), mask=inside)
    tl.store(step_at, step.to(tl.float32), mask=inside)


@triton.jit
def _moved(
    param, exp_avg, exp_avg_sq, grad, l2, keep, coefficients, beta1, rest1, beta2, rest2,
    PARAM: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """One update: the parameter and both moments."""
    size = tl.load(coefficients)
    damping = tl.load(coefficients + 1)
    # Sums of products are fused here and nowhere else (enable_fp_fusion is off), so that whole and
    # partial blocks get the same bits.
    total = grad
    if l2 != 0:  # an infinite parameter times 0 would be NaN
        total = tl.fma(param, l2, grad)
    if (PARAM == tl.bfloat16) | (PARAM == tl.float16):  # noqa: SIM300
        exp_avg, exp_avg_sq = _moments(exp_avg, exp_avg_sq, total, beta1, rest1, beta2, rest2)
        root = tl.sqrt(exp_avg_sq) + damping
        # An estimate from the exponent, within 12 %, refined to 3e-6.
        inverse = (0x7EF311C7 - root.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
        rest = tl.fma(-root, inverse, 1.0)
        inverse = tl.fma(tl.fma(rest, rest, rest), inverse, inverse)
        inverse = tl.fma(tl.fma(-root, inverse, 1.0), inverse, inverse)
    else:
        # From the side that carries more, as torch does: float32 holds 1 - beta1 more exactly than
        # beta1.
        blend1 = tl.where(beta1 < 0.5, -beta1, rest1)
        start = tl.where(beta1 < 0.5, total, exp_avg)
        exp_avg = tl.fma(total - exp_avg, blend1, start)
        exp_avg_sq = tl.fma(total * rest2, total, exp_avg_sq * beta2)
        root = tl.sqrt(exp_avg_sq) + damping
        if MATH == tl.float32:  # noqa: SIM300
            # 1 / root: the hardware's approximate rsqrt, squared, and one Newton step. Half the
            # instructions of a division; finite roots only, a square may have overflowed.
            root = tl.minimum(root, 3e38)
            inverse = tl.rsqrt(root)
            inverse *= inverse
            inverse = tl.fma(tl.fma(-root, inverse, 1.0), inverse, inverse)
        else:
            inverse = 1.0 / root
    return tl.fma(-size * exp_avg, inverse, param * keep), exp_avg, exp_avg_sq


@triton.jit
def _moments(exp_avg, exp_avg_sq, grad, beta1, rest1, beta2, rest2):
    """After one update of a half. No square overflows: the roots' arithmetic is for finite ones.

    Both moments are those of the bounded gradient, for their ratio is what moves a parameter. 0
    times an infinite one makes NaN of it. Without a select, which takes 20 registers more.
    """
    bounded = tl.fma(grad, 0.0, tl.maximum(tl.minimum(grad, 1e17), -1e17))
    exp_avg = tl.fma(exp_avg, beta1, bounded * rest1)
    return exp_avg, tl.fma(exp_avg_sq, beta2, bounded * rest2 * bounded)


@triton.jit
def _moved_twice(
    param, exp_avg, exp_avg_sq, grad, keep, coefficients, beta1, rest1, beta2, rest2
):  # fmt: skip
    """Two updates of a half at once: a / r + b / s is (a * s + b * r) / (r * s), one reciprocal.

    Moving halves takes little time: the kernel would wait for the units that compute roots.
    """
    exp_avg, exp_avg_sq = _moments(exp_avg, exp_avg_sq, grad, beta1, rest1, beta2, rest2)
    move = (tl.load(coefficients) * keep) * exp_avg
    root = tl.sqrt(exp_avg_sq) + tl.load(coefficients + 1)
    exp_avg, exp_avg_sq = _moments(exp_avg, exp_avg_sq, grad, beta1, rest1, beta2, rest2)
    next_move = tl.load(coefficients + COEFFICIENTS) * exp_avg
    next_root = tl.sqrt(exp_avg_sq) + tl.load(coefficients + COEFFICIENTS + 1)
    inverse = tl.rsqrt(root * next_root)
    inverse *= inverse
    moves = tl.fma(next_move, root, move * next_root)
    return tl.fma(-moves, inverse, param * (keep * keep)), exp_avg, exp_avg_sq


@triton.jit
def _moved_often(
    param, exp_avg, exp_avg_sq, grad, l2, keep, coefficients, num_steps, in_pairs,
    beta1, rest1, beta2, rest2, PARAM: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """num_steps updates: in_pairs of them two at a time, the others one by one."""
    if (PARAM == tl.bfloat16) | (PARAM == tl.float16):  # noqa: SIM300
        for i in range(0, in_pairs, 2):
            param, exp_avg, exp_avg_sq = _moved_twice(
                param, exp_avg, exp_avg_sq, grad, keep, coefficients + i * COEFFICIENTS,
                beta1, rest1, beta2, rest2,
            )  # fmt: skip
    for i in range(in_pairs, num_steps):
        param, exp_avg, exp_avg_sq = _moved(
            param, exp_avg, exp_avg_sq, grad, l2, keep, coefficients + i * COEFFICIENTS,
            beta1, rest1, beta2, rest2, PARAM, MATH,
        )  # fmt: skip
    return param, exp_avg, exp_avg_sq


@triton.jit
def _fetch(
    param_at, grad_at, exp_avg_at, exp_avg_sq_at, first, offsets, end,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A block as it lies in memory: parameter, gradient, both moments."""
    return (
        fetch(param_at, first, offsets, end, PARAM, WHOLE),
        fetch(grad_at, first, offsets, end, GRAD, WHOLE),
        fetch(exp_avg_at, first, offsets, end, STATE, WHOLE),
        fetch(exp_avg_sq_at, first, offsets, end, STATE, WHOLE),
    )


@triton.jit
def _update(
    param, grad, exp_avg, exp_avg_sq,
    param_at, exp_avg_at, exp_avg_sq_at, copy_at, offsets, end, coefficients, num_steps, in_pairs,
    beta1, rest1, beta2, rest2, l2, keep, scale, key,
    PARAM: tl.constexpr, STATE: tl.constexpr, COPY: tl.constexpr,
    MATH: tl.constexpr, STOCHASTIC: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The updates of a block that was fetched; which of its gradients are not finite."""
    param = param.to(MATH)
    exp_avg = exp_avg.to(MATH)
    exp_avg_sq = exp_avg_sq.to(MATH)
    if (PARAM == tl.bfloat16) | (PARAM == tl.float16):  # noqa: SIM300
        # Infinite where its dtype did not hold a square: beyond 65504 in float16.
        exp_avg_sq = tl.minimum(exp_avg_sq, 3e38, propagate_nan=tl.PropagateNan.ALL)
    grad = grad.to(MATH) * scale
    unfit = (tl.abs(grad) < float("inf")) == 0  # Triton 3.2's interpreter has no ~ of flags
    # The usual values as constants: the compiler takes them out of the loop.
    if (l2 != 0) | (keep != 1):
        param, exp_avg, exp_avg_sq = _moved_often(
            param, exp_avg, exp_avg_sq, grad, l2, keep, coefficients, num_steps, in_pairs,
            beta1, rest1, beta2, rest2, PARAM, MATH,
        )  # fmt: skip
    else:
        param, exp_avg, exp_avg_sq = _moved_often(
            param, exp_avg, exp_avg_sq, grad, 0.0, 1.0, coefficients, num_steps, in_pairs,
            beta1, rest1, beta2, rest2, PARAM, MATH,
        )  # fmt: skip
    if STOCHASTIC:
        random = noise(offsets, key)
        new_param = round_param(param, random, PARAM)
        exp_avg, exp_avg_sq = round_moments(exp_avg, exp_avg_sq, random)
    else:
        new_param = param.to(PARAM)
    write(exp_avg_at, offsets, end, exp_avg, STATE, WHOLE)
    write(exp_avg_sq_at, offsets, end, exp_avg_sq, STATE, WHOLE)
    write(param_at, offsets, end, new_param, PARAM, WHOLE)
    if COPY is not None:
        write(copy_at, offsets, end, new_param.to(tl.float32), COPY, WHOLE)
    return unfit


@triton.jit(do_not_specialize=["num_steps"])
def adam_kernel(
    table, record, chunks, coefficients, copies, num_steps,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, COPY: tl.constexpr,
    MATH: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """copies [T] int64: where, as COPY, a copy of every new parameter goes; None: nowhere."""
    after_previous_kernel(EARLY)
    row, entry, start, end = locate(table, chunks, CHUNK)
    param_at = tl.load(entry + PARAM_AT)
    exp_avg_at = tl.load(entry + STATE1_AT)
    exp_avg_sq_at = tl.load(entry + STATE2_AT)
    grad_at = gradient(record, row)
    copy_at = param_at
    if COPY is not None:
        copy_at = tl.load(copies + row)
    key = 0
    if STOCHASTIC:
        step = tl.load(tl.load(entry + STEP_AT).to(tl.pointer_type(tl.float32)))
        key = noise_key(tl.load(record + SEED), tl.load(entry + FLAGS) >> 1, step, start)
    coefficients += row * num_steps * COEFFICIENTS
    # Read once: stores to memory would have them read again for every block.
    num_steps = updates(record, num_steps)
    beta1 = option(record, BETA1).to(MATH)
    rest1 = (1.0 - option(record, BETA1)).to(MATH)
    beta2 = option(record, BETA2).to(MATH)
    rest2 = (1.0 - option(record, BETA2)).to(MATH)
    l2 = option(record, L2).to(MATH)
    keep = (1.0 - option(record, LR) * option(record, DECAY)).to(MATH)
    scale = (option(record, SIGN) * option(record, FACTOR)).to(MATH)
    # Halves take two at a time where these do not depend on one another and the product of their
    # roots does not underflow. Found once: a block would wait for it behind the next one's fetch.
    in_pairs = 0
    if (PARAM == tl.bfloat16) | (PARAM == tl.float16):  # noqa: SIM300
        in_pairs = tl.where((l2 == 0) & (tl.load(coefficients + 1) > 1e-18), num_steps // 2 * 2, 0)
    addresses = param_at | exp_avg_at | exp_avg_sq_at | grad_at | copy_at
    whole = whole_blocks(addresses, start, end, BLOCK)
    offsets = start + tl.arange(0, BLOCK)
    broken = offsets < 0
    # The next block is under way while this one is computed.
    first = start
    stop = start + whole * BLOCK
    param, grad, exp_avg, exp_avg_sq = _fetch(
        param_at, grad_at, exp_avg_at, exp_avg_sq_at, first, offsets, stop,
        PARAM, GRAD, STATE, WHOLE=True,
    )  # fmt: skip
    for _ in range(whole):
        first += BLOCK
        next_param, next_grad, next_exp_avg, next_exp_avg_sq = _fetch(
            param_at, grad_at, exp_avg_at, exp_avg_sq_at, first, offsets + BLOCK, stop,
            PARAM, GRAD, STATE, WHOLE=True,
        )  # fmt: skip
        broken |= _update(
            param, grad, exp_avg, exp_avg_sq,
            param_at, exp_avg_at, exp_avg_sq_at, copy_at, offsets, end, coefficients,
            num_steps, in_pairs, beta1, rest1, beta2, rest2, l2, keep, scale, key,
            PARAM, STATE, COPY, MATH, STOCHASTIC, WHOLE=True,
        )  # fmt: skip
        param, grad = next_param, next_grad
        exp_avg, exp_avg_sq = next_exp_avg, next_exp_avg_sq
        offsets += BLOCK
    for _ in range(whole, tl.cdiv(end - start, BLOCK)):
        param, grad, exp_avg, exp_avg_sq = _fetch(
            param_at, grad_at, exp_avg_at, exp_avg_sq_at, start, offsets, end,
            PARAM, GRAD, STATE, WHOLE=False,
        )  # fmt: skip
        broken |= _update(
            param, grad, exp_avg, exp_avg_sq,
            param_at, exp_avg_at, exp_avg_sq_at, copy_at, offsets, end, coefficients,
            num_steps, in_pairs, beta1, rest1, beta2, rest2, l2, keep, scale, key,
            PARAM, STATE, COPY, MATH, STOCHASTIC, WHOLE=False,
        )  # fmt: skip
        offsets += BLOCK
    tl.store(record + BROKEN + tl.zeros_like(offsets), 1, mask=broken)


@triton.jit
def _restore(
    param_at, base_at, exp_avg_at, exp_avg_sq_at, offsets, end,
    PARAM: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    base = read(base_at, offsets, end, PARAM, PARAM, WHOLE)
    write(param_at, offsets, end, base, PARAM, WHOLE)
    write(exp_avg_at, offsets, end, tl.zeros_like(base), PARAM, WHOLE)
    write(exp_avg_sq_at, offsets, end, tl.zeros_like(base), PARAM, WHOLE)


@triton.jit
def restore_kernel(
    table, record, chunks, PARAM: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Parameters from their base values, whose addresses are in the gradients' place; moments and
    step counters 0. PARAM is an integer type of the parameters' size: bits are not to change."""
    after_previous_kernel(EARLY)
    row, entry, start, end = locate(table, chunks, CHUNK)
    param_at = tl.load(entry + PARAM_AT)
    exp_avg_at = tl.load(entry + STATE1_AT)
    exp_avg_sq_at = tl.load(entry + STATE2_AT)
    base_at = gradient(record, row)
    whole = whole_blocks(param_at | exp_avg_at | exp_avg_sq_at | base_at, start, end, BLOCK)
    offsets = start + tl.arange(0, BLOCK)
    for _ in range(whole):
        _restore(param_at, base_at, exp_avg_at, exp_avg_sq_at, offsets, end, PARAM, WHOLE=True)
        offsets += BLOCK
    for _ in range(whole, tl.cdiv(end - start, BLOCK)):
        _restore(param_at, base_at, exp_avg_at, exp_avg_sq_at, offsets, end, PARAM, WHOLE=False)
        offsets += BLOCK
    if start == 0:
        tl.store(tl.load(entry + STEP_AT).to(tl.pointer_type(tl.float32)), 0.0)
