# SPDX-License-Identifier: Apache-2.0
"""The generated block about what hullkit was tried on."""

from __future__ import annotations

from rows import Row, generated, rows, table

KINDS = {"python": "", "compilers": "", "processors": ", emulated"}


def _libraries(row: Row) -> str:
    named = [f"{name} {row[name]}" for name in ("torch", "numpy", "triton") if row[name]]
    return ", ".join(named) or f"kernels: {row['simd']}"


@generated
def reach() -> str:
    latest = {(row["kind"], row["what"], row["torch"]): row for row in rows("reach")}
    lines = [
        [row["what"] + KINDS[kind], _libraries(row), f"{row['passed']} {row['unit']}"]
        for kind in KINDS
        for (of_kind, _, _), row in sorted(latest.items())
        if of_kind == kind
    ]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in latest.values()))
    end = f"Commits {commits}, `python -m bench.quality.reach`."
    return table(["what", "with", "passed"], lines, 2) + "\n\n" + end
