"""Rows of bench/results/*.csv, and where they were measured."""

from __future__ import annotations

import csv
import platform
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FIELDS = ["op", "provider", "shape", "dtype", "p20", "p50", "p80", "unit", "rounds", "peak_mb"]
FIELDS += ["device", "threads", "torch", "numpy", "simd", "commit", "command"]


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def commit() -> str:
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True
    )
    return result.stdout.strip() or "unknown"


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerows(rows)
