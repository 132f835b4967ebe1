# SPDX-License-Identifier: Apache-2.0
"""Candidates that are nearly the same vertex, found and merged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import hullkit
import numpy as np
import pytest
import torch
from _cases import DTYPES, FAMILIES, batch, clustered
from _certificates import assert_counts


def _with_copies(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """pool (4, 63, 129), its rows from 40 on copies of others, exact or at a cosine of 1 - 5e-5."""
    pool, query = batch(torch.float64, b=4)
    source = torch.randint(0, 40, (4, 23), generator=torch.Generator().manual_seed(0))
    copies = pool.gather(1, source[..., None].expand(-1, -1, 129)).clone()
    noise = torch.randn(4, 11, 129, generator=torch.Generator().manual_seed(1)).double()
    noise = noise / noise.norm(dim=-1, keepdim=True)
    copies[:, 12:] += 1e-2 * noise
    pool[:, 40:] = copies
    return pool.to(dtype), query.to(dtype), source


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_are_found(dtype: torch.dtype) -> None:
    pool, _, source = _with_copies(dtype)
    exact = hullkit.duplicates(pool, eps=1e-12)
    near = hullkit.duplicates(pool, eps=1e-3)
    alone = torch.arange(40).expand(4, -1)
    assert torch.equal(exact[:, :40], alone)
    assert torch.equal(near[:, :40], alone)
    assert torch.equal(exact[:, 40:52], source[:, :12])
    assert torch.equal(near[:, 40:], source)
    assert (exact[:, 52:] == torch.arange(52, 63)).sum() >= 40  # but for two alike by chance


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 0.1, 0.5, 2.0])
@pytest.mark.parametrize("family", ["gaussian", "clustered", "duplicates", "crowded", "collinear"])
def test_equals_the_oracle(family: str, eps: float) -> None:
    for seed in range(4):
        pool = torch.from_numpy(FAMILIES[family](np.random.default_rng(seed), 63, 17)[0])
        found = hullkit.duplicates(pool, eps=eps)
        assert torch.equal(found, hullkit.duplicates(pool, eps=eps, backend="reference"))
        assert (found <= torch.arange(63)).all()
        assert torch.equal(found[found], found), "representatives represent themselves"


def test_no_chain_joins_what_is_far_apart() -> None:
    """Points on a circle, 10 degrees apart; within 15 degrees: 0 and 1, 2 and 3, ..."""
    angles = torch.deg2rad(torch.arange(9, dtype=torch.float64) * 10)
    pool = torch.stack([angles.cos(), angles.sin()], 1)
    eps = 1 - float(torch.cos(torch.deg2rad(torch.tensor(15.0))))
    assert hullkit.duplicates(pool, eps=eps).tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 8]
    assert hullkit.duplicates(3 * pool, eps=eps).tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 8]


@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_and_shared(dtype: torch.dtype) -> None:
    pool, _, _ = _with_copies(dtype)
    lengths = torch.tensor([63, 1, 50, 41])
    candidates = torch.randint(-1, 63, (4, 30), generator=torch.Generator().manual_seed(2))
    ragged = hullkit.duplicates(pool, eps=1e-3, lengths=lengths)
    shared = hullkit.duplicates(pool[0], eps=1e-3, candidates=candidates)
    also = hullkit.duplicates(pool[0], eps=1e-3, lengths=lengths)
    for b in range(4):
        size = int(lengths[b])
        assert torch.equal(ragged[b, :size], hullkit.duplicates(pool[b, :size], eps=1e-3))
        assert (ragged[b, size:] == -1).all()
        assert torch.equal(also[b, :size], hullkit.duplicates(pool[0, :size], eps=1e-3))
        assert torch.equal(shared[b] == -1, candidates[b] == -1)
        one = hullkit.duplicates(pool[0], eps=1e-3, candidates=candidates[b])
        assert torch.equal(shared[b], one)
        valid = (candidates[b] >= 0).nonzero().flatten()
        dense = hullkit.duplicates(pool[0, candidates[b, valid]], eps=1e-3)
        assert torch.equal(shared[b, valid], valid[dense])
    assert hullkit.duplicates(pool[:0], eps=0.1).shape == (0, 63)


def _problems() -> dict[str, dict[str, Any]]:
    pool, query, _ = _with_copies(torch.float64)
    candidates = torch.stack([torch.randperm(63)[:50] for _ in range(4)])
    return {
        "batched": {"pool": pool, "query": query},
        "strided": {"pool": pool.transpose(0, 1).contiguous().transpose(0, 1), "query": query},
        "expanded": {"pool": pool[:1].expand(4, -1, -1), "query": query},
        "unbatched": {"pool": pool[0], "query": query[0]},
        "shared": {"pool": pool[0], "query": query},
        "ragged": {"pool": pool, "query": query, "lengths": torch.tensor([63, 45, 60, 50])},
        "candidates": {"pool": pool[0], "query": query, "candidates": candidates},
    }


@pytest.mark.parametrize("method", ["hull", "knn"])
@pytest.mark.parametrize("name", _problems())
def test_merged(name: str, method: str) -> None:
    """Chosen from representatives alone, by their positions among all."""
    problem = _problems()[name]
    merged = hullkit.select(**problem, total=9, method=method, merge_duplicates=1e-3)
    again = hullkit.select(
        **problem, total=9, method=method, merge_duplicates=1e-3, backend="reference"
    )
    assert torch.equal(merged.rows, again.rows)
    assert torch.equal(merged.counts, again.counts)
    assert_counts(merged.counts, 9)
    assert merged.representatives is not None
    used = merged.indices >= 0
    own = merged.representatives.expand(*merged.indices.shape[:-1], -1)
    own = own.gather(-1, merged.indices.clamp_min(0))
    assert torch.equal(own[used], merged.indices[used])
    candidates = problem.get("candidates")
    expected = (
        merged.indices if candidates is None else candidates.gather(-1, merged.indices.clamp_min(0))
    )
    assert torch.equal(merged.rows[used], expected[used])
    if name == "unbatched" and method == "hull":
        kept = (merged.representatives == torch.arange(63)).nonzero().flatten()
        alone = hullkit.select(problem["pool"][kept], problem["query"], 9)
        size = int(alone.result.support_size)
        assert torch.equal(kept[alone.indices[:size]], merged.indices[:size])
        assert torch.equal(alone.counts[:size], merged.counts[:size])


def test_exact_copies_change_nothing() -> None:
    """The lowest index wins a tie, so exact copies are never chosen anyway."""
    pool, query = clustered(np.random.default_rng(0), 63, 129)
    twice = torch.from_numpy(np.concatenate([pool, pool]))
    plain = hullkit.select(twice, torch.from_numpy(query), 20)
    merged = hullkit.select(twice, torch.from_numpy(query), 20, merge_duplicates=1e-12)
    assert torch.equal(plain.rows, merged.rows)
    assert torch.equal(plain.counts, merged.counts)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_bad_arguments(backend: str | None) -> None:
    pool, _ = batch(torch.float32, b=2, n=9, d=5)
    for eps in (0.0, -1.0, 2.5, float("nan")):
        with pytest.raises(ValueError, match="eps: expected a number"):
            hullkit.duplicates(pool, eps=eps, backend=backend)
    with pytest.raises(TypeError, match=r"pool: expected a torch.Tensor or an array .*, got list"):
        hullkit.duplicates([1.0], eps=0.1, backend=backend)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"pool: expected shape"):
        hullkit.duplicates(pool[0, 0], eps=0.1, backend=backend)
    with pytest.raises(ValueError, match=r"lengths: expected shape \(2,\), got \(3,\)"):
        hullkit.duplicates(pool, eps=0.1, lengths=torch.tensor([1, 2, 3]), backend=backend)
    broken = pool.clone()
    broken[1, 3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"pool: .*finite"):
        hullkit.duplicates(broken, eps=0.1, backend=backend)
    for wrong, error in ((3.0, ValueError), ("a", TypeError)):
        with pytest.raises(error, match=r"^merge_duplicates: expected a number"):
            hullkit.select(pool, pool[:, 0], 3, merge_duplicates=wrong, backend=backend)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="query: expected d = 5"):
        hullkit.select(pool, torch.zeros(2, 4), 3, merge_duplicates=0.1, backend=backend)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps", [1e-300, 1e-17, 3e-16, 1e-12])
def test_equal_rows_are_found_with_every_eps(eps: float, dtype: torch.dtype, device: str) -> None:
    """A square of a rounded root may be above the number, by more than a tiny eps takes off."""
    rows = torch.randn(100, 33, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    expected = torch.arange(100, device=device).repeat(2)
    assert torch.equal(hullkit.duplicates(torch.cat([rows, rows]), eps=eps), expected)
    answer = hullkit.duplicates(torch.cat([rows, rows]), eps=eps, backend="reference")
    assert torch.equal(answer, expected)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_memory_grows_with_rows_alone() -> None:
    """8000 rows have a Gram matrix of 256 MB, half of it without its mirror image."""
    script = """
import re, torch, hullkit
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) >> 10
pool = torch.randn(8000, 4)
hullkit.duplicates(pool[:9], eps=1e-9)
before = peak()
assert (hullkit.duplicates(pool, eps=1e-9) == torch.arange(8000)).all()
assert peak() - before < 30, peak() - before
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_an_expanded_pool_is_not_copied() -> None:
    """1000 times 100 rows of 512 numbers would be 200 MB."""
    script = """
import re, torch, hullkit
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) >> 10
rows, queries = torch.randn(100, 512), torch.randn(1000, 512)
merge = lambda count: hullkit.select(
    rows.expand(count, -1, -1), queries[:count], 5, method="knn", merge_duplicates=1e-3
)
merge(9)
before = peak()
merge(1000)
assert peak() - before < 50, peak() - before
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("shape", [(), (4,), (0, 4), (2, 0, 4), (1, 2, 3, 4)])
def test_pools_that_are_none_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^pool: expected"):
        hullkit.duplicates(torch.zeros(shape), eps=0.1)
