# SPDX-License-Identifier: Apache-2.0
"""The generated blocks about many prompts at once."""

from __future__ import annotations

from rows import Row, find, generated, gib, source, table, times

ALONE = ("TestTimeFinetuner, LoRA r=16", "TestTimeFinetuner, all weights")


def _last_run() -> list[Row]:
    """The rows of the last build and device that ran many prompts."""
    found = find("gpu", op="many prompts")
    last = found[-1]
    return [row for row in found if all(row[key] == last[key] for key in ("commit", "device"))]


@generated
def prompts_a_second() -> str:
    """Each model's rows, beside its own baselines of the same run."""
    lines = []
    baselines: dict[tuple[str, str], float] = {}
    found = _last_run()
    for row in found:
        if not row["p50"]:
            continue
        model, slots = row["shape"].split()[:2]
        rate = float(row["p50"])
        if row["provider"] in ALONE:
            baselines[model, row["provider"]] = rate
            name, ratios = row["provider"].partition(", ")[2] + ", one at a time", ["", ""]
        else:
            name = f"PromptBatch, {slots.removeprefix('slots=')} slots"
            ratios = [times(rate / baselines[model, alone]) for alone in ALONE]
        lines.append([model, name, f"{rate:.2f}", *ratios, gib(row["peak_mb"])])
    header = ["model", "how", "prompts a second", "of LoRA alone", "of all weights alone", "GiB"]
    return table(header, lines, 2) + "\n\n" + source(found[-1])
