# SPDX-License-Identifier: Apache-2.0
"""The problems that the tests share: families of pools and queries, odd shapes, options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

Array = NDArray[np.float64]
Builder = Callable[[np.random.Generator, int, int], tuple[Array, Array]]

SIZES = (1, 2, 3, 63, 129, 151)  # n; 1000 has tests of its own
DIMS = (1, 2, 3, 17, 63, 64, 129, 384)  # d
TOTALS = (1, 2, 7, 20, 50, 151)
HALVES = (torch.float16, torch.bfloat16)
LOW_PRECISION = (torch.float32, *HALVES)
DTYPES = (torch.float64, *LOW_PRECISION)
CI_EXAMPLES = 100  # hypothesis's own number; the profile "long" has more


def fixed(max_examples: int, **more: Any) -> settings:
    """The same examples in every run and on every machine; the profile "long" has other ones and
    many more."""
    times = settings().max_examples // CI_EXAMPLES
    return settings(
        max_examples=max_examples * times,
        derandomize=times == 1,
        deadline=None,
        database=None,
        **more,
    )


def machine(max_examples: int, steps: int) -> settings:
    """The same for a state machine: `steps` rules an example."""
    # CI reports a failure as it was found: making it shorter takes minutes.
    phases = [Phase.generate, *([Phase.shrink] if settings().max_examples > CI_EXAMPLES else [])]
    checks = list(HealthCheck)
    return fixed(
        max_examples, stateful_step_count=steps, phases=phases, suppress_health_check=checks
    )


def unit(rows: Array) -> Array:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def _gaussian(rng: np.random.Generator, n: int, d: int) -> tuple[Array, Array]:
    return rng.standard_normal((n, d)), rng.standard_normal(d)


def clustered(rng: np.random.Generator, n: int, d: int) -> tuple[Array, Array]:
    """Unit vectors around a few centres: what retrieval returns."""
    centres = rng.standard_normal((max(1, n // 12), d))
    own = centres[rng.integers(len(centres), size=n)]
    query = centres[0] + 0.5 * rng.standard_normal(d)
    return unit(own + 0.4 * rng.standard_normal((n, d))), unit(query)


def _duplicates(rng: np.random.Generator, n: int, d: int) -> tuple[Array, Array]:
    distinct, query = clustered(rng, max(1, n // 3), d)
    return distinct[rng.integers(len(distinct), size=n)], query


def _all_equal(rng: np.random.Generator, n: int, d: int) -> tuple[Array, Array]:
    return np.repeat(rng.standard_normal((1, d)), n, axis=0), rng.standard_normal(d)


def _at_vertex(rng: np.random.Generator, n: int, d: int) -> tuple[Array, Array]:
    pool, _ = clustered(rng, n, d)
    return pool, pool[rng.integers(n)].copy()


def _inside(rng: np.random.Generator, n: int, d: int) -> tuple[Array, Array]:
    pool, _ = _gaussian(rng, n, d)
    return pool, rng.dirichlet(np.ones(n)) @ pool


def _outside(rng: np.random.Generator, n: int, d: int) -> tuple[Array, Array]:
    pool, query = _gaussian(rng, n, d)
    return pool, query + 5.0 * unit(query) * np.abs(pool).max()


def _on_edge(rng: np.random.Generator, n: int, d: int) -> tuple[Array, Array]:
    pool, _ = _gaussian(rng, n, d)
    return pool, 0.3 * pool[rng.integers(n)] + 0.7 * pool[rng.integers(n)]


def _far(rng: np.random.Generator, n: int, d: int) -> tuple[Array, Array]:
    pool, query = _gaussian(rng, n, d)
    return pool, 1e4 * query


def _zero_query(rng: np.random.Generator, n: int, d: int) -> tuple[Array, Array]:
    return rng.standard_normal((n, d)), np.zeros(d)


def _mixed_norms(rng: np.random.Generator, n: int, d: int) -> tuple[Array, Array]:
    pool, query = _gaussian(rng, n, d)
    return pool * 10.0 ** rng.uniform(-2, 2, (n, 1)), query


# Two vertices tie only where rows are equal (and then their bits are equal too), or where both are
# touched already and the next step is 0.
GENERIC: dict[str, Builder] = {
    "gaussian": _gaussian,
    "clustered": clustered,
    "duplicates": _duplicates,
    "all_equal": _all_equal,
    "query_at_vertex": _at_vertex,
    "query_inside": _inside,
    "query_outside": _outside,
    "query_on_edge": _on_edge,
    "query_far": _far,
    "query_zero": _zero_query,
    "mixed_norms": _mixed_norms,
}


def _grid(rng: np.random.Generator, n: int, d: int) -> tuple[Array, Array]:
    pool = rng.integers(-2, 3, (n, d)).astype(np.float64)
    return pool, rng.integers(-2, 3, d).astype(np.float64)


def _collinear(rng: np.random.Generator, n: int, d: int) -> tuple[Array, Array]:
    along, offset = rng.standard_normal((2, d))
    return offset + rng.integers(-4, 5, (n, 1)) * along, rng.standard_normal(d)


def _symmetric(rng: np.random.Generator, n: int, d: int) -> tuple[Array, Array]:
    signs = np.concatenate([np.eye(d), -np.eye(d)])
    return signs[rng.integers(2 * d, size=n)], np.full(d, rng.choice([0.0, 0.25, 1.0]))


def _inner_vertex(rng: np.random.Generator, n: int, d: int) -> tuple[Array, Array]:
    """The way to a vertex that is not the first one leaves weights of 0, or nearly."""
    pool, _ = _gaussian(rng, n, d)
    return pool, pool[rng.integers(n)].copy()


def _midpoint(rng: np.random.Generator, n: int, d: int) -> tuple[Array, Array]:
    """Two weights of one half."""
    pool, _ = _gaussian(rng, n, d)
    return pool, (pool[rng.integers(n)] + pool[rng.integers(n)]) / 2


def _unit_midpoint(rng: np.random.Generator, n: int, d: int) -> tuple[Array, Array]:
    """Halfway between two unit vectors: both are nearest."""
    pool, _ = clustered(rng, n, d)
    return pool, (pool[rng.integers(n)] + pool[rng.integers(n)]) / 2


def _crowded(rng: np.random.Generator, n: int, d: int) -> tuple[Array, Array]:
    """Unit vectors in the plane: neighbours nearly coincide, so step sizes are ill-conditioned."""
    pool, query = np.zeros((n, d)), np.zeros(d)
    plane = min(d, 2)
    pool[:, :plane], query[:plane] = clustered(rng, n, plane)
    return pool, query


def _on_sphere(rng: np.random.Generator, n: int, d: int) -> tuple[Array, Array]:
    """Sign vectors: many rows at one inner product with the query."""
    return rng.choice([-1.0, 1.0], (n, d)), rng.choice([-1.0, 0.0, 1.0], d)


# Different vertices tie in exact arithmetic or nearly so: rounding may decide the path.
TIED: dict[str, Builder] = {
    "integer_grid": _grid,
    "collinear": _collinear,
    "symmetric": _symmetric,
    "sign_vectors": _on_sphere,
    "inner_vertex": _inner_vertex,
    "midpoint": _midpoint,
    "unit_midpoint": _unit_midpoint,
    "crowded": _crowded,
}

FAMILIES = {**GENERIC, **TIED}
# Clusters of unit vectors in fewer dimensions are "crowded".
_LEAST_DIM = {"clustered": 17, "duplicates": 17}


class Spec(NamedTuple):
    """One problem, small enough to print when it fails."""

    family: str
    n: int
    d: int
    seed: int
    scale: float
    options: dict[str, Any]  # of frank_wolfe
    total: int
    exchange_passes: int

    def build(self) -> tuple[Array, Array]:
        rng = np.random.default_rng((self.seed, self.n, self.d, self.total, self.exchange_passes))
        pool, query = FAMILIES[self.family](rng, self.n, self.d)
        return self.scale * pool, self.scale * query

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
        pool, query = self.build()
        return torch.from_numpy(pool).to(dtype), torch.from_numpy(query).to(dtype)


@st.composite
def specs(
    draw: st.DrawFn,
    family: str | st.SearchStrategy[str],
    sizes: tuple[int, ...] = SIZES,
    dims: tuple[int, ...] = DIMS,
    scales: tuple[float, ...] = (1.0, 1e-3, 0.1, 30.0, 1e3),
) -> Spec:
    name = family if isinstance(family, str) else draw(family)
    options = {
        "max_support": draw(st.sampled_from((None, 1, 2, 7, 50))),
        "max_iters": draw(st.sampled_from((250, 250, 250, 0, 1, 5))),
        "tol": draw(st.sampled_from((1e-5, 1e-5, 1e-2, 0.5))),
    }
    return Spec(
        family=name,
        n=draw(st.sampled_from(sizes)),
        d=draw(st.sampled_from([d for d in dims if d >= _LEAST_DIM.get(name, 1)])),
        seed=draw(st.integers(0, 2**32 - 1)),
        scale=draw(st.sampled_from(scales)),
        options=options,
        total=draw(st.sampled_from(TOTALS)),
        exchange_passes=draw(st.integers(0, 3)),
    )


def batch(dtype: torch.dtype, b: int = 5, n: int = 63, d: int = 129) -> tuple[Any, Any]:
    """pool (b, n, d) and query (b, d) of clustered unit vectors."""
    problems = [clustered(np.random.default_rng(seed), n, d) for seed in range(b)]
    pools, queries = zip(*problems, strict=True)
    return (
        torch.from_numpy(np.stack(pools)).to(dtype),
        torch.from_numpy(np.stack(queries)).to(dtype),
    )
