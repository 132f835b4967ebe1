"""The generated block about long use: adaptations, Ctrl-C and the fuzzer."""

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


def _adaptation(name: str) -> Row:
    return one("reliability", check="adaptations", figure=name, commit=_latest("adaptations"))


def _fuzzed(name: str) -> int:
    return int(one("reliability", check="fuzzer", figure=name, commit=_latest("fuzzer"))["value"])


@generated
def reliability() -> str:
    p50, p99 = (f"{figure(float(_adaptation(name)['value']))} ms" for name in ("p50", "p99"))
    grown, changed = (_adaptation(name) for name in ("bytes grown", "base weights changed"))
    memory = f"{int(grown['value']):,} bytes more"
    bits = "as before" if changed["value"] == "0" else "CHANGED"
    fuzzed = f"no crash in {_fuzzed('seconds')} s"
    lines = [
        *_ctrl_c(),
        ["time of an adaptation", grown["count"], f"median {p50}, 99th percentile {p99}"],
        ["memory of the process, second half against first", grown["count"], memory],
        ["bits of the base weights afterwards", changed["count"], bits],
        ["fuzzed calls of the core's selections", f"{_fuzzed('calls'):,}", fuzzed],
    ]
    return table(["check", "cases", "result"], lines, 3) + "\n\n" + source(grown)
