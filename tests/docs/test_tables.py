# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures of the documentation are what the committed rows and scripts say."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_tables_are_those_of_the_rows() -> None:
    result = run("docs/tables.py", "--check")
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_table_is_on_a_page() -> None:
    scripts = [*(ROOT / "docs").glob("*_tables.py")]
    defined = {
        name
        for script in scripts
        for name in re.findall(
            r"^@generated\n(?:@.*\n)?def (\w+)", script.read_text(), re.MULTILINE
        )
    }
    used = {name for page in PAGES for name in re.findall(r"<!-- table: (\w+)", page.read_text())}
    assert defined == used


def test_pictures_are_those_of_the_script() -> None:
    code = (
        "import sys; sys.path.insert(0, 'docs'); import pictures;"
        "sys.exit([p.name for p, s in pictures.drawn().items() if p.read_text() != s] or 0)"
    )
    result = run("-c", code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["ttft_gpu", "ttft_cpu", "ttft_gpu_pybytes"])
def test_judged_seconds_are_compared_on_one_device(name: str) -> None:
    """Rules are compared at equal seconds within a path, so a path has one device."""
    devices: dict[str, set[str]] = {}
    with (ROOT / "bench" / "results" / f"{name}.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["phase"] == "judge":
                devices.setdefault(row["path"], set()).update(row["device"].split(" and "))
    assert devices
    assert all(len(found) == 1 for found in devices.values()), devices
