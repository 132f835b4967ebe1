# SPDX-License-Identifier: Apache-2.0
"""Every public name has an example in its docstring, and every example prints what it says."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from enum import Enum
from typing import Any

import hullkit
import pytest

ROOMS = ("optim", "prompt_batch", "reference", "interop.activeft", "interop.faiss")
ROOMS += ("interop.hullft",)
if importlib.util.find_spec("pyarrow"):  # Ray's
    ROOMS += ("interop.ray",)
MEMBERS = {
    "TestTimeFinetuner": ("adapted", "adapt_", "warmup", "recorded_lengths", "release"),
    "optim.Adam": ("step", "update_in_backward"),
}
NO_EXAMPLE = {"__version__", *ROOMS, "recipes"}


def at(path: str) -> Any:
    value = hullkit
    for name in path.split("."):
        value = getattr(value, name)
    return value


def public() -> Iterator[tuple[str, Any]]:
    for name in hullkit.__all__:
        if name not in NO_EXAMPLE:
            yield f"hullkit.{name}", getattr(hullkit, name)
    for room in ROOMS:
        module = importlib.import_module(f"hullkit.{room}")
        for name in module.__all__:
            yield f"hullkit.{room}.{name}", getattr(module, name)
    for owner, names in MEMBERS.items():
        for name in names:
            yield f"hullkit.{owner}.{name}", getattr(at(owner), name)
    yield "hullkit.recipes.Recipe", hullkit.recipes.Recipe
    yield "hullkit.finetune.report.PhaseSeconds", at("finetune.report.PhaseSeconds")


NAMES = dict(public())


def is_result(value: Any) -> bool:
    """A tuple with names, or an enumeration."""
    return isinstance(value, type) and (hasattr(value, "_fields") or issubclass(value, Enum))


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


@pytest.mark.parametrize("name", [name for name, value in NAMES.items() if is_result(value)])
def test_fields_are_documented(name: str) -> None:
    text = (inspect.getdoc(NAMES[name]) or "").partition("Attributes:")[2]
    for field in getattr(NAMES[name], "_fields", None) or NAMES[name].__members__:
        assert re.search(rf"^    {field}: ", text, re.MULTILINE), f"{name}: {field}"
