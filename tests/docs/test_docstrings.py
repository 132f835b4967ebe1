# SPDX-License-Identifier: Apache-2.0
"""Every public name has an example in its docstring, and every example prints what it says."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Iterator
from typing import Any

import hullkit
import pytest
from hullkit import optim, prompt_batch, reference
from hullkit.interop import activeft
from hullkit.interop import faiss as faiss_adapter
from hullkit.interop import hullft as hullft_adapter

CONSTANTS = {"__version__", "recipes", "optim", "prompt_batch"}


def public() -> Iterator[tuple[str, Any]]:
    for name in hullkit.__all__:
        if name not in CONSTANTS:
            yield f"hullkit.{name}", getattr(hullkit, name)
    for name in ("adapted", "adapt_", "warmup", "release"):
        yield f"hullkit.TestTimeFinetuner.{name}", getattr(hullkit.TestTimeFinetuner, name)
    for name in optim.__all__:
        yield f"hullkit.optim.{name}", getattr(optim, name)
    for name in prompt_batch.__all__:
        yield f"hullkit.prompt_batch.{name}", getattr(prompt_batch, name)
    for name in ("step", "update_in_backward"):
        yield f"hullkit.optim.Adam.{name}", getattr(optim.Adam, name)
    for name in reference.__all__:
        yield f"hullkit.reference.{name}", getattr(reference, name)
    yield "hullkit.interop.activeft.Retriever", activeft.Retriever
    for name in ("FWSelector", "integerize_by_geometry"):
        yield f"hullkit.interop.hullft.{name}", getattr(hullft_adapter, name)
    for name in ("search", "select", "Texts"):
        yield f"hullkit.interop.faiss.{name}", getattr(faiss_adapter, name)


NAMES = dict(public())


@pytest.mark.parametrize("name", NAMES)
def test_example(name: str) -> None:
    value = NAMES[name]
    text = inspect.getdoc(value) or ""
    found = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    assert found.examples, f"{name} has no example"
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(found, out=report.append)
    assert not runner.failures, "".join(report)
