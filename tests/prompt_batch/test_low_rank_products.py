"""Products with the factors of several slots against float64.

In Triton's interpreter where there is no GPU.
"""

from __future__ import annotations

import pytest
import torch
from hullkit.language_model.stacked_low_rank import add_low_rank_, low_rank_gradients_
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []  # there they run on it
SHAPES = [(1, 1, 1, 1, 1), (2, 17, 40, 65, 3), (3, 33, 600, 130, 16), (1, 40, 129, 63, 40)]
# Relative to the largest number; a half is rounded once more on the way.
BOUNDS = {torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}
SCALE = 0.5


def problem(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    slots, length, width, out, rank = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(DEVICE, dtype)

    return {
        "y": random(slots, length, out), "x": random(slots, length, width),
        "d": random(slots, length, out), "d_x": random(slots, length, width),
        "a": random(slots, rank, width), "b": random(slots, out, rank),
    }  # fmt: skip


def exact(of: dict[str, Tensor]) -> dict[str, Tensor]:
    y, x, d, d_x, a, b = (of[name].double() for name in ("y", "x", "d", "d_x", "a", "b"))
    h, d_h = x @ a.mT, SCALE * d @ b
    return {
        "y": y + SCALE * h @ b.mT, "d_b": SCALE * d.mT @ h, "d_a": d_h.mT @ x, "d_x": d_x + d_h @ a
    }  # fmt: skip


def computed(of: dict[str, Tensor], backend: str | None) -> dict[str, Tensor]:
    # Factors and their gradients are parts of a larger memory, as a slot's are.
    a, b = (torch.cat([of[name].flatten(1)] * 2, 1) for name in ("a", "b"))
    a, b = (t[:, : t.shape[1] // 2].view(of[n].shape) for t, n in ((a, "a"), (b, "b")))
    d_a, d_b = (torch.full_like(t, float("nan"), dtype=torch.float32) for t in (a, b))
    y, d_x = of["y"].clone(), of["d_x"].clone()
    h = add_low_rank_(y, of["x"], a, b, SCALE, backend=backend)
    low_rank_gradients_(of["d"], of["x"], h, a, b, SCALE, d_a, d_b, d_x, backend=backend)
    return {"y": y, "d_b": d_b, "d_a": d_a, "d_x": d_x}


@pytest.mark.parametrize("backend", ["triton", None])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_and_gradients(
    shape: tuple[int, ...], dtype: torch.dtype, backend: str | None
) -> None:
    of = problem(shape, dtype)
    wanted, got = exact(of), computed(of, backend)
    for name, value in wanted.items():
        error = float((got[name].double() - value).abs().max() / value.abs().max())
        assert error <= BOUNDS[dtype], name


def test_the_same_bits_again_and_whatever_a_neighbour_holds() -> None:
    of = problem((2, 17, 40, 65, 3), torch.float32)
    first = computed(of, "triton")
    for name in of:
        of[name][1] = float("nan")
    second = computed(of, "triton")
    for name, value in first.items():
        assert torch.equal(value[0], second[name][0]), name
