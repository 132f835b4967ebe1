# SPDX-License-Identifier: Apache-2.0
"""Every test runs with poisoned memory, and GPU tests only where there is a GPU."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import _hullft
import pytest
import torch
from _cases import CI_EXAMPLES
from hullkit.language_model import fused_modules
from hypothesis import settings

settings.register_profile("long", max_examples=20 * CI_EXAMPLES)  # of `make fuzz-python`

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

# Under `with torch.device(...)` torch looks functions up in a set that it makes on first use: of
# the real ones, not of those that a test replaces.
with torch.device("cpu"):
    torch.empty(0)
# torch.compile makes such a list of functions as well.
with suppress(RuntimeError):  # a Python too new for this torch's compiler
    torch.compile(torch.zeros_like, backend="eager")(torch.ones(1))


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`allocate`, its memory filled with what nobody can mistake for a result."""

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.dtype.is_floating_point:
            tensor.detach().fill_(float("nan"))  # a leaf with a gradient takes no filling
        elif tensor.dtype in (torch.int64, torch.int32):
            tensor.fill_(torch.iinfo(tensor.dtype).min)
        return tensor

    return poisoned


@pytest.fixture(autouse=True)
def poisoned_outputs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """An output element that a kernel leaves unwritten fails the test that looks at it."""
    if "plain_memory" in request.keywords:
        return
    # The compiler knows functions by a map that init_process_group clears: not by the ones below.
    rules = sys.modules.get("torch._dynamo.trace_rules")
    if rules is not None:
        rules.get_torch_obj_rule_map()
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Thousands of tiny passes: threads that wait for each other on a busy machine take minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def replaced_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no GPU, parts of models are replaced all the same, and call their own code."""
    monkeypatch.setattr(fused_modules, "has_kernels_for", lambda model, backend: True)


@pytest.fixture
def package() -> Iterator[Any]:
    """The stand-in freshly imported, as the package of somebody else; forgotten afterwards."""
    yield importlib.import_module(_hullft.PACKAGE)
    for name in [name for name in sys.modules if name.partition(".")[0] == _hullft.PACKAGE]:
        del sys.modules[name]
