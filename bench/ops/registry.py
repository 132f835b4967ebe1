# SPDX-License-Identifier: Apache-2.0
"""Every operation's benchmark: who competes, on which problem, and the gate they pass first."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import hullkit
import numpy as np
import torch
from hullkit import reference
from hullkit.interop import hullft

from bench.harness.problems import KINDS, Selection
from bench.rivals import eager_torch

TOTAL = 50  # updates, and the limit of the support


@dataclass(frozen=True)
class Case:
    """One operation on one problem. `providers` return comparable answers; `gate` compares them."""

    op: str
    shape: str
    dtype: str
    providers: dict[str, Callable[[], Any]]
    gate: Callable[[dict[str, Any]], None]

    @property
    def id(self) -> str:
        return f"{self.op}-{self.shape}-{self.dtype}"


def _with_threads(threads: int, call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        torch.set_num_threads(threads)
        return call()

    return run


def _single(kind: str, n: int, d: int) -> tuple[Selection, torch.Tensor, torch.Tensor]:
    problem = KINDS[kind](1, n, d)
    pool, query = (torch.from_numpy(array[0]).float() for array in problem)
    # The oracle gets the very numbers the float32 kernels get.
    return Selection(pool.double().numpy(), query.double().numpy()), pool, query


def _loss(problem: Selection, indices: Any, counts: Any) -> float:
    indices, counts = np.asarray(indices), np.asarray(counts)
    used = indices >= 0
    share = counts[used] / counts[used].sum()
    return float(np.sum((problem.query - share @ problem.pool[indices[used]]) ** 2))


def _gate_losses(problem: Selection, exactly: int | None) -> Callable[[dict[str, Any]], None]:
    """Nobody reconstructs the query worse than the oracle; integer answers sum to `exactly`."""

    def gate(answers: dict[str, Any]) -> None:
        wanted = _loss(problem, *answers["numpy"])
        for provider, (indices, counts) in answers.items():
            if exactly is not None:
                assert int(np.sum(np.asarray(counts))) == exactly, provider
            assert _loss(problem, indices, counts) <= wanted + 1e-5, provider

    return gate


def _gate_equal(answers: dict[str, Any]) -> None:
    for provider, answer in answers.items():
        assert np.array_equal(np.asarray(answer), np.asarray(answers["numpy"])), provider


def selection_cases(kind: str, n: int, d: int) -> Iterator[Case]:
    """One prompt, float32, one thread: frank_wolfe, round_multiplicities, and both (`select`)."""
    problem, pool, query = _single(kind, n, d)
    shape = f"{kind} n={n} d={d} total={TOTAL}"
    outcome = reference.frank_wolfe(problem.pool, problem.query, TOTAL)
    support = problem.pool[outcome.indices]
    result = hullkit.FrankWolfeResult(
        torch.from_numpy(outcome.indices), torch.from_numpy(outcome.weights), *[torch.empty(0)] * 5
    )
    weights = torch.from_numpy(outcome.weights).float()

    def numpy_select() -> tuple[Any, Any]:
        indices, weights, *_ = reference.frank_wolfe(problem.pool, problem.query, TOTAL)
        return indices, reference.round_multiplicities(
            problem.pool[indices], problem.query, weights, TOTAL
        )

    def torch_select() -> tuple[Any, Any]:
        indices, weights = eager_torch.frank_wolfe(pool, query, TOTAL)
        return indices, eager_torch.round_multiplicities(pool[indices], query, weights, TOTAL)

    def two_calls() -> tuple[Any, Any]:
        result = hullkit.frank_wolfe(pool, query, max_support=TOTAL)
        return result.indices, hullkit.round_multiplicities(pool, query, result, TOTAL)

    yield Case(
        "frank_wolfe",
        shape,
        "float32",
        {
            "numpy": lambda: reference.frank_wolfe(problem.pool, problem.query, TOTAL)[:2],
            "torch": lambda: eager_torch.frank_wolfe(pool, query, TOTAL),
            "hullkit": lambda: hullkit.frank_wolfe(pool, query, max_support=TOTAL)[:2],
        },
        _gate_losses(problem, None),
    )
    yield Case(
        "round_multiplicities",
        f"{shape} m={len(support)}",
        "float32",
        {
            "numpy": lambda: (
                outcome.indices,
                reference.round_multiplicities(support, problem.query, outcome.weights, TOTAL),
            ),
            "torch": lambda: (
                outcome.indices,
                eager_torch.round_multiplicities(pool[result.indices], query, weights, TOTAL),
            ),
            "hullkit": lambda: (
                outcome.indices,
                hullkit.round_multiplicities(pool, query, result, TOTAL),
            ),
        },
        _gate_losses(problem, TOTAL),
    )
    yield Case(
        "select",
        shape,
        "float32",
        {
            "numpy": numpy_select,
            "torch": torch_select,
            "hullkit": lambda: hullkit.select(pool, query, TOTAL)[:2],
            "hullkit, two calls": two_calls,
        },
        _gate_losses(problem, TOTAL),
    )


def variant_cases(n: int, d: int) -> Iterator[Case]:
    """The variants with an active set, with and without a cap; and duplicates."""
    problem, pool, query = _single("neighbours", n, d)
    for options in (
        {"variant": "away"},
        {"variant": "pairwise"},
        {"variant": "fully_corrective"},
        {"variant": "fully_corrective", "max_weight": 2 / TOTAL},
    ):
        name = options["variant"] + (" capped" if "max_weight" in options else "")
        yield Case(
            "frank_wolfe",
            f"neighbours n={n} d={d} {name}",
            "float32",
            {
                "numpy": partial(_indices_and_weights, reference.frank_wolfe, *problem, **options),
                "hullkit": partial(
                    _indices_and_weights, hullkit.frank_wolfe, pool, query, **options
                ),
            },
            _gate_losses(problem, None),
        )
    yield Case(
        "duplicates",
        f"neighbours n={n} d={d}",
        "float32",
        {
            "numpy": lambda: reference.duplicates(problem.pool, 1e-3),
            "hullkit": lambda: hullkit.duplicates(pool, eps=1e-3),
        },
        _gate_equal,
    )


def _indices_and_weights(run: Callable[..., Any], *problem: Any, **options: Any) -> Any:
    return run(*problem, **options)[:2]


def hullft_case(kind: str, n: int, d: int) -> Case:
    """The selection of one query in HullFT-shaped code: NumPy in, a NumPy array of updates out."""
    problem, pool, query = _single(kind, n, d)
    embeddings, embedding = pool.numpy(), query.numpy()

    def calling_code(select: Callable[..., Any], integerize: Callable[..., Any]) -> Any:
        indices, weights = select(embeddings, embedding, TOTAL)
        support, target = embeddings.astype("float64")[indices], embedding.astype("float64")
        expanded, _ = integerize(indices, weights, support, target, TOTAL)
        return expanded

    def naive_select(embeddings: Any, embedding: Any, n_points: int) -> Any:
        pool, query = embeddings.astype("float64"), embedding.astype("float64")
        return reference.frank_wolfe(pool, query, n_points)[:2]

    def naive_integerize(indices: Any, weights: Any, support: Any, target: Any, total: int) -> Any:
        counts = reference.round_multiplicities(support, target, weights, total)
        return np.repeat(indices, counts), np.full(total, 1 / total)

    def gate(answers: dict[str, Any]) -> None:
        counted = {name: np.unique(answer, return_counts=True) for name, answer in answers.items()}
        _gate_losses(problem, TOTAL)(counted)

    selector = hullft.FWSelector(max_iter=250, tol=1e-5)
    return Case(
        "interop.hullft",
        f"{kind} n={n} d={d} total={TOTAL}",
        "float32",
        {
            "numpy": lambda: calling_code(naive_select, naive_integerize),
            "hullkit": lambda: calling_code(selector.select, hullft.integerize_by_geometry),
        },
        gate,
    )


def _posterior_variance(problem: Selection, order: Any, noise: float) -> float:
    rows = problem.pool[np.asarray(order)]
    across = rows @ problem.query
    observed = rows @ rows.T + noise * np.eye(len(rows))
    return float(problem.query @ problem.query - across @ np.linalg.solve(observed, across))


def _activeft(pool: torch.Tensor, query: torch.Tensor) -> Callable[[], Any]:
    """Its Retriever as its users call it: over a faiss index, all defaults."""
    import faiss
    from activeft.sift import Retriever

    index = faiss.IndexFlatIP(pool.shape[1])
    index.add(pool.numpy())
    retriever = Retriever(index)

    def run() -> Any:
        with warnings.catch_warnings():  # it turns tensors into arrays in a deprecated way
            warnings.simplefilter("ignore", DeprecationWarning)
            return retriever.search(query[None].numpy(), TOTAL, None)[1]

    return run


def sift_case(kind: str, n: int, d: int) -> Case:
    """One prompt, float32: activeft on one thread and on all that its torch would take."""
    problem, pool, query = _single(kind, n, d)
    providers: dict[str, Callable[[], Any]] = {
        "numpy": lambda: reference.sift(problem.pool, problem.query, TOTAL).order,
        "hullkit": lambda: hullkit.sift(pool, query, TOTAL).order,
    }
    if importlib.util.find_spec("activeft") is not None:
        call, threads = _activeft(pool, query), os.cpu_count() or 1
        providers["activeft"] = call
        providers[f"activeft {threads} threads"] = _with_threads(threads, call)

    def gate(answers: dict[str, Any]) -> None:
        least = _posterior_variance(problem, answers["numpy"], 0.01)
        for provider, order in answers.items():
            assert abs(_posterior_variance(problem, order, 0.01) - least) <= 1e-4, provider

    return Case("sift", f"{kind} n={n} d={d} total={TOTAL}", "float32", providers, gate)


def scan_cases(n: int, d: int) -> Iterator[Case]:
    """One pass over a pool: lmo and knn."""
    problem, pool, query = _single("neighbours", n, d)
    shape = f"n={n} d={d}"
    yield Case(
        "lmo",
        shape,
        "float32",
        {
            "numpy": lambda: reference.lmo(problem.pool, problem.query)[0],
            "torch": lambda: torch.argmin(pool @ query),
            "hullkit": lambda: hullkit.lmo(pool, query).index,
        },
        _gate_equal,
    )
    yield Case(
        "knn",
        f"{shape} k={TOTAL}",
        "float32",
        {
            "numpy": lambda: reference.knn(problem.pool, problem.query, TOTAL)[0],
            "torch": lambda: torch.topk(pool @ query, TOTAL).indices,
            "hullkit": lambda: hullkit.knn(pool, query, TOTAL).indices,
        },
        _gate_equal,
    )


def apportion_case(size: int) -> Case:
    weights = np.random.default_rng(0).dirichlet(np.full(size, 0.5))
    tensor = torch.from_numpy(weights)
    return Case(
        "apportion",
        f"m={size} total={TOTAL}",
        "float64",
        {
            "numpy": lambda: reference.apportion(weights, TOTAL),
            "torch": lambda: eager_torch.apportion(tensor, TOTAL),
            "hullkit": lambda: hullkit.apportion(tensor, TOTAL),
        },
        _gate_equal,
    )


def batch_case(batch: int, n: int, d: int) -> Case:
    """A batch of prompts on one thread and on two: the same bits, half the time."""
    problem = KINDS["neighbours"](batch, n, d)
    pool, query = (torch.from_numpy(array).float() for array in problem)

    def select() -> Any:
        selection = hullkit.select(pool, query, TOTAL)
        return torch.stack([selection.indices, selection.counts])

    def gate(answers: dict[str, Any]) -> None:
        one, two = answers.values()
        assert torch.equal(one, two)

    return Case(
        "select",
        f"neighbours B={batch} n={n} d={d} total={TOTAL}",
        "float32",
        {
            "hullkit 1 thread": _with_threads(1, select),
            "hullkit 2 threads": _with_threads(2, select),
        },
        gate,
    )


def cases() -> Iterator[Case]:
    for kind in KINDS:
        for d in (384, 1024):
            yield from selection_cases(kind, 200, d)
            yield hullft_case(kind, 200, d)
            yield sift_case(kind, 200, d)
    for d in (384, 1024):
        yield from variant_cases(200, d)
    for n in (200, 20_000):
        yield from scan_cases(n, 384)
    yield apportion_case(TOTAL)
    for d in (384, 1024):
        yield batch_case(64, 200, d)
