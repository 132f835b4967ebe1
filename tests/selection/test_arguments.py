# SPDX-License-Identifier: Apache-2.0
"""What crosses into the core has one declaration: a record of other names is refused on import."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hullkit import FrankWolfeResult, _core
from hullkit.native import kernels, operators
from hullkit.reference import batched


class _OtherOptions(NamedTuple):
    max_support: int
    max_iters: int
    gap_tol: float  # not in this order
    tol: float
    variant: int
    max_weight: float


def test_records_must_name_the_operators_arguments() -> None:
    problem = ("pool", "query", "lengths", "candidates")
    with pytest.raises(ImportError, match=r"frank_wolfe: expected arguments .*'tol', 'gap_tol'"):
        operators.check_arguments("frank_wolfe", *problem, _OtherOptions, FrankWolfeResult)
    with pytest.raises(ImportError, match="lmo: expected arguments"):
        operators.check_arguments("lmo", *problem, "index", "value")  # the query is a direction


def test_oracles_must_take_the_operators_arguments() -> None:
    def apportion(weights: Any, total: Any) -> None:
        raise AssertionError("never called")

    with pytest.raises(ImportError, match=r"apportion: expected arguments .*'counts'"):
        batched.as_operator(apportion)


def test_schemas_are_the_cores() -> None:
    for name in ("lmo", "knn", "duplicates", "frank_wolfe", "select", "sift", "apportion"):
        schema = getattr(torch.ops.hullkit, name).default._schema
        assert str(schema) == f"hullkit::{kernels.schema(name)}"
        assert tuple(argument.name for argument in schema.arguments) == (
            kernels.argument_names(name)
        )


def test_core_says_which_argument_is_wrong() -> None:
    cpu = _core.operations["apportion"].cpu
    with pytest.raises(AttributeError, match="'float' object has no attribute 'data_ptr'"):
        cpu(1.0, 3, None, 1)
    with pytest.raises(TypeError, match="total: expected a value, got none"):
        cpu(None)
    with pytest.raises(TypeError, match="expected 4 arguments"):
        cpu(None, 3, None, 1, 1)
