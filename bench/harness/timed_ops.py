# SPDX-License-Identifier: Apache-2.0
"""Times every case of the registry, for `make bench`; no number without a green gate."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from bench.ops.registry import Case, cases

ALL = {(case.id, provider): case for case in cases() for provider in case.providers}


@cache
def _gate(case_id: str) -> None:
    case = next(case for (name, _), case in ALL.items() if name == case_id)
    case.gate({provider: run() for provider, run in case.providers.items()})


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("case_id", "provider"), ALL, ids=["-".join(key) for key in ALL])
def bench_op(benchmark: Any, case_id: str, provider: str) -> None:
    _gate(case_id)
    case: Case = ALL[case_id, provider]
    benchmark.extra_info.update(op=case.op, shape=case.shape, dtype=case.dtype, provider=provider)
    benchmark(case.providers[provider])
