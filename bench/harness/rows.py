# SPDX-License-Identifier: Apache-2.0
"""Rows of bench/results/*.csv, and where they were measured."""

from __future__ import annotations

import csv
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
FIELDS = ["op", "provider", "shape", "dtype", "p20", "p50", "p80", "unit", "rounds", "peak_mb"]
FIELDS += ["device", "threads", "torch", "numpy", "simd", "commit", "command"]


def processor() -> str:
    listed = Path("/proc/cpuinfo")  # of Linux
    for line in listed.read_text().splitlines() if listed.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def commit() -> str:
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return result.stdout.strip() or "unknown"


def quantiles(values: Sequence[float]) -> dict[str, float]:
    shares = {"p20": 0.2, "p50": 0.5, "p80": 0.8}
    return {key: round(sorted(values)[int(len(values) * of)], 5) for key, of in shares.items()}


def timings(
    times: dict[tuple[str, str, str, str], list[float]], device: str, command: str
) -> list[dict[str, Any]]:
    """A row for each (op, provider, dtype, shape): quantiles of its milliseconds."""
    rows = []
    for (op, provider, dtype, shape), values in times.items():
        rows.append(
            {"op": op, "provider": provider, "shape": shape, "dtype": dtype}
            | quantiles(values)
            | {"unit": "ms"}
            | {"rounds": len(values), "device": device, "torch": torch.__version__}
            | {"commit": commit(), "command": command}
        )
    return rows


def append(path: Path, rows: list[dict[str, Any]], fields: list[str] = FIELDS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
