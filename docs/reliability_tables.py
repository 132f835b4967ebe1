# SPDX-License-Identifier: Apache-2.0
"""The generated block about what hits the library and what long use costs."""

from __future__ import annotations

from rows import Row, figure, generated, rows, source, table

CALLS = {  # what they are figures of, and how a good result is told
    "fuzzer": ("fuzzed calls of the core's selections", "calls", "no crash"),
    "state-machines": ("stories of state machines in Python", "stories", "no failure"),
    "faults": ("signals and errors at every moment", "faults", "restored every time"),
    "hostile": ("calls with arguments that do not fit", "tests", "named in the error"),
    "concurrency": ("threads, forks, workers and signals", "tests", "passed"),
    "sanitizers": ("tests and inputs under the sanitizers", "tests", "no report"),
    "gpu-sanitizers": ("calls under compute-sanitizer's three tools", "calls", "no report"),
}
LOADS = {
    "adaptations": "adaptations of the embedded model on a CPU, last layer",
    "gpu-adaptations": "adaptations of SmolLM2-135M's shape on a GPU",
    "gpu-selections": "selections on a GPU, 512 prompts a call",
}


def _latest(check: str) -> list[Row]:
    """The rows of a check's last run: its figures, each once, at one commit by one command."""
    of = [row for row in rows("reliability") if row["check"] == check]
    return [row for row in of if all(row[key] == of[-1][key] for key in ("commit", "command"))]


def _values(check: str) -> dict[str, float]:
    found = {row["figure"]: float(row["value"]) for row in _latest(check)}
    if len(found) != len(_latest(check)):
        raise LookupError(
            f"reliability.csv: expected each figure of {check!r} once in its last run"
        )
    return found


def _counted(check: str) -> list[str]:
    name, unit, result = CALLS[check]
    values = _values(check)
    count = sum(value for key, value in values.items() if key in (unit, "inputs"))
    return [name, f"{count:,.0f}", f"{result} in {values['seconds']:.0f} s"]


def _load(check: str) -> list[str]:
    values = _values(check)
    grown = [
        f"{max(value, 0.0) / 2**20:.1f} MiB {where}"
        for key, where in (("bytes grown", "grown"), ("bytes grown on the device", "on the device"))
        if (value := values.get(key)) is not None
    ]
    times = f"p50 {figure(values['p50'])} ms, p99 {figure(values['p99'])} ms"
    changed = [f"{key}: {value:.0f}" for key, value in values.items() if key in WRONG]
    return [
        LOADS[check],
        f"{int(_latest(check)[0]['count']):,}",
        "; ".join([times, *grown, *changed]),
    ]


WRONG = ("base weights changed", "texts with other weights", "prompts with other results")


@generated
def reliability() -> str:
    lines = [
        [f"Ctrl-C in `{name}`", row["count"], f"answered within {figure(value, 2)} s"]
        for (name, value), row in zip(_values("ctrl-c").items(), _latest("ctrl-c"), strict=True)
    ]
    lines += [_counted(check) for check in CALLS if _latest(check)]
    lines += [_load(check) for check in LOADS if _latest(check)]
    sources = [
        f"{check}: {source(_latest(check)[0])}"
        for check in ("ctrl-c", *CALLS, *LOADS)
        if _latest(check)
    ]
    return (
        table(["check", "cases", "result"], lines, 3)
        + "\n\n"
        + "\n".join(f"- {s}" for s in sources)
    )


@generated
def supply_chain() -> str:
    of = _latest("supply-chain")
    lines = [[row["figure"], f"{row['value']} {row['unit']}"] for row in of]
    return table(["check", "passed"], lines, 2) + "\n\n" + source(of[0])
