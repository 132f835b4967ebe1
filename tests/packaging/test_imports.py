# SPDX-License-Identifier: Apache-2.0
"""Modules import each other in one direction."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import hullkit
import pytest

ROOT = Path(hullkit.__file__).parent


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in ROOT.rglob("*.py")}


def imported(name: str) -> set[str]:
    """The modules of hullkit that this module imports, also for type checkers or in functions.

    A package stands for itself only where a name comes from it that is no module.
    """
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level]
            source = ".".join([*(base if node.level else []), *filter(None, [node.module])])
            for alias in node.names:
                if alias.name == "_core":  # compiled
                    continue
                inner = f"{source}.{alias.name}"
                found.add(inner if inner in MODULES else source)
    return found & MODULES.keys()


def test_no_circle() -> None:
    try:
        TopologicalSorter({name: imported(name) for name in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_finetuner_has_one_direction() -> None:
    tuner, run = "hullkit.finetune.tuner", "hullkit.finetune.query_run"
    block = "hullkit.finetune.adaptation"
    assert {run, block} <= imported(tuner)
    assert not {tuner, block} & imported(run)
    assert not {tuner, run} & imported(block)
