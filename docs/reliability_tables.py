# SPDX-License-Identifier: Apache-2.0
"""The generated block about Ctrl-C and the fuzzer."""

from __future__ import annotations

from rows import Row, figure, find, generated, one, rows, source, table


def _latest(check: str) -> str:
    """The commit of the last rows of a check."""
    return [row for row in rows("reliability") if row["check"] == check][-1]["commit"]


def _ctrl_c() -> list[list[str]]:
    found: list[Row] = find("reliability", check="Ctrl-C", commit=_latest("Ctrl-C"))
    return [
        [
            f"Ctrl-C in `{row['figure']}`",
            row["count"],
            f"answered within {figure(float(row['value']), 2)} s",
        ]
        for row in found
    ]


def _fuzzed(name: str) -> int:
    return int(one("reliability", check="fuzzer", figure=name, commit=_latest("fuzzer"))["value"])


@generated
def reliability() -> str:
    fuzzed = f"no crash in {_fuzzed('seconds')} s"
    lines = [
        *_ctrl_c(),
        ["fuzzed calls of the core's selections", f"{_fuzzed('calls'):,}", fuzzed],
    ]
    last = one("reliability", check="fuzzer", figure="calls", commit=_latest("fuzzer"))
    return table(["check", "cases", "result"], lines, 3) + "\n\n" + source(last)
