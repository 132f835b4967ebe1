# SPDX-License-Identifier: Apache-2.0
"""Rows of bench/results/*.csv, and where they were measured."""

from __future__ import annotations

import csv
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
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


def command(given: Sequence[str] | None = None) -> str:
    """What runs, to be run again. given: its arguments; default: the process's own.

    Without --out, and of folders and files their names alone.
    """
    words = [*(sys.argv[1:] if given is None else given)]
    words = [word for word in words if not word.startswith("--out=")]
    if "--out" in words:
        at = words.index("--out")
        del words[at : at + 2]
    main = getattr(sys.modules["__main__"], "__spec__", None)
    module = "bench" if main is None else main.name.removesuffix(".__main__")
    return shlex.join(["python", "-m", module, *(w.rpartition("/")[2] or w for w in words)])


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Medians and what lies around them; those of two values lie between the two."""
    shares = {"p20": 0.2, "p50": 0.5, "p80": 0.8}
    return {key: round(float(np.quantile(values, share)), 5) for key, share in shares.items()}


def row(
    op: str, provider: str, shape: str, dtype: torch.dtype | str, values: Sequence[float],
    device: torch.device | str = "cpu", *, unit: str = "ms", given: Sequence[str] | None = None,
    **facts: Any,
) -> dict[str, Any]:  # fmt: skip
    """What was measured, where, and how. facts: further FIELDS, or others in a field's place.

    values: of all rounds; none for what could not be measured.
    """
    cuda = torch.device(device).type == "cuda"
    of = quantiles(values) if values else dict.fromkeys(("p20", "p50", "p80"), "")
    where = torch.cuda.get_device_name() if cuda else processor()
    return (
        {"op": op, "provider": provider, "shape": shape}
        | {"dtype": str(dtype).removeprefix("torch."), "unit": unit, "rounds": len(values)}
        | of
        | {"device": where, "threads": "" if cuda else torch.get_num_threads()}
        | {"torch": torch.__version__, "numpy": np.__version__}
        | {"commit": commit(), "command": command(given)}
        | facts
    )


def timings(
    times: dict[tuple[str, str, str, str], list[float]], device: torch.device | str
) -> list[dict[str, Any]]:
    """A row for each (op, provider, dtype, shape): quantiles of its milliseconds."""
    return [
        row(op, provider, shape, dtype, values, device)
        for (op, provider, dtype, shape), values in times.items()
    ]


def append(path: Path, rows: list[dict[str, Any]], fields: list[str] = FIELDS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
