# SPDX-License-Identifier: Apache-2.0
"""Sums of products of all slots at once: the formula, its edges, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hullkit.language_model.product_sums import (
    FactorGradients,
    ProductSum,
    Term,
    gradients_take,
    product_sums,
    product_sums_take,
)
from hullkit.native import kernels
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
on_hopper = pytest.mark.skipif(
    not kernels.product_sums_usable(torch.device("cuda", 0) if DEVICE.type == "cuda" else DEVICE),
    reason="no code for this device",
)
if DEVICE.type == "cuda":
    pytestmark = [pytest.mark.gpu]
BACKEND = "triton" if DEVICE.type == "cpu" else None
BFLOAT16 = torch.bfloat16


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, BFLOAT16)


def layers(
    slots: int, rows: int, inputs: int, outputs: list[int], rank: int, transposed: bool
) -> list[ProductSum]:
    """Forwards a sum of two terms for each layer; with `transposed` all terms in one sum."""
    x = random(slots, rows, inputs, seed=0)
    sums: list[ProductSum] = []
    terms: list[Term] = []
    for seed, wide in enumerate(outputs, 1):
        weight = random(1, wide, inputs, seed=10 * seed)
        if transposed:
            d = random(slots, rows, wide, seed=10 * seed + 1)
            terms += [Term(d, weight)]
            terms += [
                Term(
                    random(slots, rows, rank, seed=10 * seed + 2),
                    random(slots, rank, inputs, seed=10 * seed + 3),
                )
            ]
        else:
            thin = Term(
                random(slots, rows, rank, seed=10 * seed + 2),
                random(slots, wide, rank, seed=10 * seed + 3),
            )
            bias = random(wide, seed=10 * seed + 4) if seed % 2 else None
            sums.append(ProductSum([Term(x, weight), thin], bias))
    return [ProductSum(terms)] if transposed else sums


def exact(own: ProductSum, transposed: bool) -> Tensor:
    total = sum(
        rows.double() @ (factor if transposed else factor.mT).double() for rows, factor in own.terms
    )
    assert isinstance(total, Tensor)
    return total if own.bias is None else total + own.bias.double()


PROCESSORS = (
    torch.cuda.get_device_properties(DEVICE).multi_processor_count if DEVICE.type == "cuda" else 132
)
SPLIT = 128 * (PROCESSORS // 2 + 4)
# Rows around the tiles' 96, 128, 160, 200 and 208; columns around their 128; sums around stages of
# 64. With 400 rows the tiles of a last round are split, and two of them share rows.
CASES = [
    (1, 416, 576, [576], 16),
    (3, 77, 576, [192, 576, 200], 16),
    (2, 401, 1000, [1536, 328], 8),
    (1, 130, 96, [64, 8, 136], 64),
    (40, 416, 576, [576, 192], 16),
    (40, 200, 576, [576], 16),
    (64, 399, 576, [576], 16),
    (40, 400, 576, [576], 16),
    (16, 207, 200, [1536], 24),
    (9, 160, 320, [1024], 16),
    (5, 129, 64, [128], 16),
    (2, 97, 72, [120], 40),
    (1, 416, 328, [64, 72, 80], 64),
    (2, 130, 200, [64, 72, 80], 40),
    (2, 130, 200, [64, 72], 24),
]


# A round of tiles of 208 rows, and eight that are split: backwards, forwards.
SPLIT_CASES = [((1, 416, SPLIT, [96], 16), True), ((1, 416, 96, [SPLIT], 16), False)]


@pytest.mark.parametrize(
    ("case", "transposed"),
    [(case, transposed) for transposed in (False, True) for case in CASES] + SPLIT_CASES,
)
def test_the_formula(case: tuple[int, int, int, list[int], int], transposed: bool) -> None:
    sums = layers(*case, transposed)
    assert DEVICE.type == "cpu" or product_sums_take(sums, transposed, BACKEND)
    for own, found in zip(sums, product_sums(sums, transposed), strict=True):
        wanted = exact(own, transposed)
        # Products of halves are exact in float32. Sums of N terms err by less than N units of the
        # float32 sums on their way, here well below a rounding to bfloat16: half a unit of 2^-7.
        unit = 2.0**-8 * wanted.abs() + 2.0**-17 * wanted.abs().max()
        assert found.dtype is BFLOAT16
        assert found.is_contiguous()
        assert bool(((found.double() - wanted).abs() <= 1.01 * unit).all())


def factor_gradients(
    slots: int, rows: int, columns: int, rank: int, factors: int, dtype: torch.dtype
) -> FactorGradients:
    made = []
    for seed in range(factors):
        memory = torch.full((slots, rank * columns + 8), torch.nan, dtype=dtype, device=DEVICE)
        d_a = memory[:, : rank * columns].unflatten(1, (rank, columns))
        made.append((random(slots, rows, rank, seed=100 + seed), d_a))
    return FactorGradients(random(slots, rows, columns, seed=99), made)


@pytest.mark.parametrize("case", [*CASES, SPLIT_CASES[0][0]])
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_gradients_of_factors_beside_the_sums(
    case: tuple[int, int, int, list[int], int], dtype: torch.dtype
) -> None:
    slots, rows, inputs, outputs, rank = case
    sums = layers(*case, True)
    alone = product_sums(sums, True)
    of = factor_gradients(slots, rows, inputs, rank, len(outputs), dtype)
    assert gradients_take(of)
    together = product_sums(sums, True, gradients=of)
    assert torch.equal(together[0], alone[0])
    for d_inner, d_a in of.factors:
        wanted = d_inner.double().mT @ of.x.double()
        # Sums of up to 416 exact products in float32, and a rounding to d_a's dtype.
        unit = torch.finfo(dtype).eps / 2.0 * wanted.abs() + 2.0**-17 * wanted.abs().max()
        assert bool(((d_a.double() - wanted).abs() <= 1.01 * unit).all())


def test_gradients_of_factors_with_numbers_that_are_not_finite() -> None:
    """They stay in their slot, and in their factor: tiles have places that nobody fills."""
    sums = layers(3, 110, 192, [136, 136], 16, True)
    of = factor_gradients(3, 110, 192, 16, 2, torch.float32)
    product_sums(sums, True, gradients=of)
    wanted = [d_a.clone() for _, d_a in of.factors]
    of.factors[1][0][1, 5] = float("nan")
    product_sums(sums, True, gradients=of)
    assert torch.equal(of.factors[0][1], wanted[0])
    found = of.factors[1][1]
    assert bool(found[1].isnan().all())
    assert torch.equal(found[0::2], wanted[1][0::2])


def test_gradients_of_factors_of_rows_that_lie_apart() -> None:
    sums = layers(3, 150, 320, [256], 16, True)
    of = factor_gradients(3, 150, 320, 16, 1, torch.float32)
    apart = random(4, 150, 640, seed=1)[1:4, :, 64:384].copy_(of.x)
    product_sums(sums, True, gradients=of)
    wanted = of.factors[0][1].clone()
    product_sums(sums, True, gradients=FactorGradients(apart, of.factors))
    assert torch.equal(of.factors[0][1], wanted)


def test_gradients_of_factors_only_beside_an_inputs() -> None:
    of = factor_gradients(3, 110, 192, 16, 1, torch.float32)
    with pytest.raises(ValueError, match="gradients: expected them only with transposed=True"):
        product_sums(layers(3, 110, 192, [136], 16, False), False, gradients=of)


@on_hopper
def test_more_factors_than_the_kernel_takes() -> None:
    of = factor_gradients(3, 110, 192, 16, 4, torch.float32)
    with pytest.raises(ValueError, match="expected gradients of 0 to 3 factors"):
        product_sums(layers(3, 110, 192, [136], 16, True), True, gradients=of)


def test_gradients_of_factors_that_are_not_taken() -> None:
    of = factor_gradients(2, 40, 64, 16, 2, torch.float32)
    assert gradients_take(of)
    (d_inner, d_a), other = of.factors
    assert not gradients_take(FactorGradients(of.x, []))
    assert not gradients_take(FactorGradients(of.x, [(d_inner, d_a.bfloat16()), other]))
    if DEVICE.type == "cuda":
        assert not gradients_take(FactorGradients(of.x, [(d_inner, d_a)] * 4))
        assert not gradients_take(FactorGradients(of.x.float(), of.factors))
        assert not gradients_take(FactorGradients(of.x, [(d_inner, d_a.half())]))
        assert not gradients_take(FactorGradients(of.x, [(d_inner[..., 1:], d_a)]))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_slot_has_the_bits_of_the_slot_alone(transposed: bool) -> None:
    sums = layers(7, 150, 320, [264, 264], 16, transposed)
    of = factor_gradients(7, 150, 320, 16, 2, torch.float32) if transposed else None
    together = product_sums(sums, transposed, gradients=of)
    expected: list[tuple[Tensor, Tensor]] = []
    for slot in (0, 3, 6):
        alone = [
            ProductSum(
                [
                    Term(rows[slot : slot + 1], factor if len(factor) == 1 else factor[slot, None])
                    for rows, factor in own.terms
                ],
                own.bias,
            )
            for own in sums
        ]
        own = None
        if of is not None:
            pairs = [(d_inner[slot, None], torch.empty(1, 16, 320)) for d_inner, _ in of.factors]
            pairs = [(d_inner, d_a.to(DEVICE)) for d_inner, d_a in pairs]
            own = FactorGradients(of.x[slot, None], pairs)
            for (_, ours), (_, theirs) in zip(of.factors, pairs, strict=True):
                expected.append((ours[slot], theirs[0]))
        found = product_sums(alone, transposed, gradients=own)
        expected += [(ours[slot], theirs[0]) for ours, theirs in zip(together, found, strict=True)]
    assert all(torch.equal(ours, theirs) for ours, theirs in expected)


def test_results_of_one_launch_have_the_bits_of_several() -> None:
    sums = layers(2, 220, 512, [384, 128, 72], 16, False)
    for own, together in zip(sums, product_sums(sums, False), strict=True):
        assert torch.equal(together, product_sums([own], False)[0])


def test_rows_and_slots_that_lie_apart() -> None:
    whole = random(4, 150, 640, seed=1)
    x, weight = whole[1:4, :, 64:384], random(1, 256, 320, seed=2)
    own = ProductSum([Term(x, weight)])
    [found] = product_sums([own], False)
    assert torch.equal(found, product_sums([ProductSum([Term(x.contiguous(), weight)])], False)[0])


def test_numbers_that_are_not_finite_stay_in_their_slot() -> None:
    sums = layers(3, 110, 192, [136], 16, False)
    wanted = product_sums(sums, False)[0].clone()
    sums[0].terms[1].rows[1, 5] = float("nan")
    found = product_sums(sums, False)[0]
    assert bool(found[1, 5].isnan().all())
    keep = torch.ones(3, 110, dtype=torch.bool, device=DEVICE)
    keep[1, 5] = False
    assert torch.equal(found[keep], wanted[keep])


@on_hopper
def test_what_the_kernel_does_not_take() -> None:
    """Other dtypes, rows that do not begin at 16 bytes, tiles that would be mostly empty."""

    def takes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
        return product_sums_take([ProductSum([Term(x, weight[None])], bias)], False)

    x, weight = random(8, 128, 256, seed=0), random(512, 256, seed=1)
    assert takes(x, weight)
    assert not takes(x.half(), weight.half())
    assert not takes(x.float(), weight.float())
    assert not takes(x[..., :252], weight[:, 4:])
    assert not takes(x, weight[:500])
    assert not takes(x, weight.t().contiguous().t())
    assert not takes(x, weight, random(512, seed=2).float())
    assert not takes(random(8, 60, 256, seed=0), weight)
    assert takes(random(1, 400, 4096, seed=0), random(1024, 4096, seed=1))
    assert not takes(random(1, 400, 8192, seed=0), random(1024, 8192, seed=1))
    wide, thin = Term(random(32, 400, 4096, seed=0), random(1, 4096, 4096, seed=1)), 8
    for rank, taken in ((thin, False), (2 * thin, True)):
        low_rank = Term(random(32, 400, rank, seed=2), random(32, 4096, rank, seed=3))
        assert product_sums_take([ProductSum([wide, low_rank])], False) is taken
    x = random(1, 400, 256, seed=0)
    assert takes(x, weight)
    four = [ProductSum([Term(x, weight[None])])] * 4
    assert product_sums_take(four[:3], False)
    assert not product_sums_take(four, False)
    assert not product_sums_take([four[0], ProductSum([Term(x, weight[None])] * 2)], False)


@on_hopper
def test_a_matrix_that_the_driver_refuses() -> None:
    x, weight = random(1, 128, 256, seed=0), random(1, 512, 252, seed=1)[..., :248]
    with pytest.raises(ValueError, match="product_sums: expected addresses and distances"):
        product_sums([ProductSum([Term(x[..., :248], weight)])], False)
