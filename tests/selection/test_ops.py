# SPDX-License-Identifier: Apache-2.0
"""Operators: schemas that tell the truth, and public functions inside `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hullkit
import pytest
import torch
from _cases import batch
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode

pytestmark = [
    pytest.mark.plain_memory,
    # torch's own modules, on their first import:
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


def _overloads() -> list[str]:
    return sorted(
        schema.name.removeprefix("hullkit::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("hullkit::")
    )


def _outputs(batch_size: int, width: int) -> list[torch.Tensor]:
    return [
        torch.zeros(batch_size, width, dtype=torch.int64),
        torch.zeros(batch_size, width, dtype=torch.float64),
    ]


def _arguments(name: str) -> list[tuple[Any, ...]]:
    """Calls of the operator `name`, every optional argument with and without."""
    pool, query = batch(torch.float32, b=3, n=9, d=17)
    shared = torch.tensor([[0, 5, -1], [2, 2, 2], [8, 1, -1]])
    lengths = torch.tensor([9, 4, 2])
    calls: list[tuple[Any, ...]] = []
    for problem in (
        (pool, query, None, None),
        (pool.half(), query.half(), lengths, None),
        (pool[0].double(), query.double(), torch.tensor([3, 2, 1]), shared),
        (pool.bfloat16()[:, ::2], query.bfloat16(), None, None),
    ):
        b, width = 3, 3
        integers = [torch.zeros(b, dtype=torch.int64) for _ in range(3)]
        floats = [torch.zeros(b, dtype=torch.float64) for _ in range(2)]
        scalars = (integers[0], *floats, *integers[1:])
        counts = _outputs(b, 7 if name == "sift" else width)[0]
        if name == "lmo":
            calls.append((*problem, integers[0], floats[0]))
        elif name == "knn":
            calls.append((*problem, *_outputs(b, width)))
        elif name == "frank_wolfe":
            calls.append((*problem, width, 20, 1e-5, -1.0, 0, 1.0, *_outputs(b, width), *scalars))
            if problem[2] is None:  # as many candidates as the cap needs
                capped = (width, 20, 1e-5, 0.1, 3, 0.5)
                calls.append((*problem, *capped, *_outputs(b, width), *scalars))
        elif name == "select":
            options = (width, 20, 1e-5, -1.0, 0, 1.0, 7, 2, 7)
            norm = torch.zeros(b, dtype=torch.float64)
            calls.append((*problem, *options, *_outputs(b, width), *scalars, counts, norm))
            if problem[2] is None:
                limited = (width, 20, 1e-5, -1.0, 3, 4 / 7, 7, 2, 4)
                calls.append((*problem, *limited, *_outputs(b, width), *scalars, counts, norm))
        elif name == "sift":
            order, variance = _outputs(b, 7)
            for vectors in (problem[1], problem[1][:, None].repeat(1, 2, 1)):
                inputs = (problem[0], vectors, *problem[2:])
                outputs = (order, variance, *_outputs(b, 7)[:1], counts, integers[0])
                calls.append((*inputs, 7, 0.2, 0.3, 7, *outputs))
        elif name == "round_multiplicities":
            indices = torch.tensor([[0, 1, -1], [1, 0, -1], [0, -1, -1]])
            weights = torch.tensor([[0.7, 0.3, 0.0]] * b, dtype=torch.float64)
            calls.append((*problem[:2], indices, weights, problem[3], 7, 2, 7, counts))
        elif name == "duplicates":
            positions = (problem[0] if problem[3] is None else problem[3].mT).shape[-2]
            calls.append((problem[0], *problem[2:], 0.1, _outputs(b, positions)[0]))
        elif name == "apportion":
            weights = torch.rand(b, 5, dtype=torch.float64)
            calls.append((weights, 7, _outputs(b, 5)[0]))
    return calls


@pytest.mark.parametrize("name", _overloads())
def test_opcheck(name: str) -> None:
    packet = getattr(torch.ops.hullkit, name)
    calls = _arguments(name)
    assert calls, f"no test calls for the operator {name}: add some"
    for overload in packet.overloads():
        for call in calls:
            library.opcheck(getattr(packet, overload), call)


def test_every_operator_is_here() -> None:
    selections = {"duplicates", "frank_wolfe", "knn", "lmo", "round_multiplicities", "select"}
    selections.add("sift")
    assert {"apportion", *selections} <= set(_overloads())


def _functions() -> dict[str, Callable[..., Any]]:
    def rounded(pool: torch.Tensor, query: torch.Tensor) -> Any:
        result = hullkit.frank_wolfe(pool, query, max_support=7)
        return hullkit.round_multiplicities(pool, query, result, 20)

    # By name: the compiler of torch 2.6 cannot cut a NamedTuple.
    def selected(pool: torch.Tensor, query: torch.Tensor, total: int, **options: Any) -> Any:
        multiset = hullkit.select(pool, query, total, **options)
        return multiset.indices, multiset.counts, multiset.rows

    def selected_auto(pool: torch.Tensor, query: torch.Tensor) -> Any:
        multiset = hullkit.select(pool, query, "auto")
        return multiset.counts, multiset.total

    return {
        "lmo": hullkit.lmo,
        "knn": lambda pool, query: hullkit.knn(pool, query, 5),
        "frank_wolfe": lambda pool, query: hullkit.frank_wolfe(pool, query, max_support=7),
        "round_multiplicities": rounded,
        "select": lambda pool, query: selected(pool, query, 20),
        "select with a limit": lambda pool, query: selected(
            pool, query, 20, max_multiplicity=4, merge_duplicates=1e-3
        ),
        "select auto": selected_auto,
        "fully corrective": lambda pool, query: hullkit.frank_wolfe(
            pool, query, variant="fully_corrective", gap_tol=1e-3
        ),
        "duplicates": lambda pool, query: hullkit.duplicates(pool, eps=0.5),
        "select knn": lambda pool, query: selected(pool, query, 5, method="knn"),
        "select knn with lengths": lambda pool, query: selected(
            pool, query, 5, method="knn", lengths=torch.tensor([9, 5, 6])
        ),
        "sift": lambda pool, query: hullkit.sift(pool, query, 7, alpha=0.3),
        "select sift": lambda pool, query: selected(pool, query, 5, method="sift"),
        "apportion": lambda pool, query: hullkit.apportion((pool @ query[0]).softmax(-1), 20),
        "around": lambda pool, query: hullkit.lmo(2 * pool, -query).value.sum(),
    }


def _assert_compiled_equals(function: Callable[..., Any], compiled: Callable[..., Any]) -> None:
    for dtype in (torch.float64, torch.float32):
        pool, query = batch(dtype, b=3, n=9, d=17)
        eager, traced = function(pool, query), compiled(pool, query)
        if isinstance(eager, torch.Tensor):
            eager, traced = (eager,), (traced,)
        for one, other in zip(eager, traced, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", _functions())
def test_compiles_as_one_graph(name: str) -> None:
    function = _functions()[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    _assert_compiled_equals(function, compiled)


class _Nearest(torch.nn.Module):
    def forward(self, pool: Any, query: Any, lengths: Any) -> Any:
        chosen = hullkit.select(pool, query, 5, method="knn", lengths=lengths)
        return chosen.indices, chosen.counts, chosen.result.values


@pytest.mark.parametrize("way", ["compile", "export"])
def test_traced_too_few_candidates_mark_their_entry(way: str) -> None:
    """Values cannot be asked for there, nor can an error be raised: as on a CUDA device."""
    pool, query = batch(torch.float32, b=3, n=9, d=17)
    lengths = torch.tensor([9, 4, 5])
    module = _Nearest()
    if way == "compile":
        torch._dynamo.reset()
        traced = torch.compile(module, fullgraph=True, backend="aot_eager")
    else:
        traced = torch.export.export(module, (pool, query, lengths)).module()
    indices, counts, values = traced(pool, query, lengths)
    assert indices[1].tolist() == [-1] * 5
    assert counts[1].tolist() == [0] * 5
    assert values[1].isnan().all()
    others = torch.tensor([0, 2])
    for ours, wanted in zip(
        (indices, counts, values),
        module(pool[others], query[others], lengths[others]),
        strict=True,
    ):
        assert torch.equal(ours[others], wanted)
    with pytest.raises(ValueError, match=r"total: expected at most 1 .* for entries \[1\]"):
        module(pool, query, lengths)


def test_fake_tensors_have_no_values() -> None:
    with FakeTensorMode():
        pool, query = torch.randn(9, 4), torch.randn(3, 4)
        lengths = torch.ones(3, dtype=torch.int64)
        chosen = hullkit.select(pool, query, 5, method="knn", lengths=lengths)
        assert chosen.counts.shape == (3, 5)
        candidates = torch.zeros(3, 6, dtype=torch.uint64)
        assert hullkit.knn(pool, query, 5, candidates=candidates).indices.shape == (3, 5)


def test_compiles_with_inductor() -> None:
    function = _functions()["frank_wolfe"]
    torch._dynamo.reset()
    _assert_compiled_equals(function, torch.compile(function, fullgraph=True))


def test_compiles_with_dynamic_shapes() -> None:
    torch._dynamo.reset()
    function = _functions()["frank_wolfe"]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for b, n, d in ((3, 9, 17), (5, 11, 33), (2, 30, 5)):
        pool, query = batch(torch.float32, b=b, n=n, d=d)
        for one, other in zip(function(pool, query), compiled(pool, query), strict=True):
            assert torch.equal(one, other)
