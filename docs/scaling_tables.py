# SPDX-License-Identifier: Apache-2.0
"""The generated blocks of the page about large corpora and many prompts."""

from __future__ import annotations

from rows import Row, figure, find, generated, source, table

SEARCH = "select from a corpus on disk"
DIMS, HALF, CODE, IDENTITY, TEXT = 1024, 2, 64, 8, 1000  # bytes beside the first
PROBES, CANDIDATES = 32, 200


def _facts(row: Row) -> dict[str, str]:
    return dict(part.split("=") for part in row["shape"].split())


@generated
def corpora_on_disk() -> str:
    lines = []
    found = find("cpu", op=SEARCH)
    found = [row for row in found if row["commit"] == found[-1]["commit"]]
    for row in found:
        facts = _facts(row)
        lines.append(
            [
                f"{int(facts['M']):,}", f"{int(facts['disk_mb']):,}", facts["lists"],
                facts["probes"], f"{float(row['p50']):.1f}", facts["opened_mb"],
                facts["one_prompt_mb"], row["peak_mb"],
            ]
        )  # fmt: skip
    header = ["vectors", "MiB on disk", "lists", "probes", "ms a prompt", "MiB grown: opened"]
    header += ["one prompt", "20 prompts"]
    return table(header, lines) + "\n\n" + source(found[0])


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{figure(value, 2)} {unit}"


@generated
def corpora_on_paper() -> str:
    """What the formulas above the table give."""
    lines = []
    for exponent in range(6, 10):
        count = 10**exponent
        lists = 4 * round(count**0.5)
        visited = PROBES * count / lists
        embeddings = count * DIMS * HALF
        index = count * (CODE + IDENTITY) + lists * DIMS * 4
        texts = count * (TEXT + 8)
        read = visited * (CODE + IDENTITY) + CANDIDATES * (DIMS * HALF)
        products = lists * DIMS + visited * CODE
        lines.append(
            [
                f"10^{exponent}", _bytes(embeddings), _bytes(index), _bytes(texts),
                f"{lists:,}", f"{visited:,.0f}", _bytes(read), f"{products / 1e6:,.0f}",
            ]
        )  # fmt: skip
    header = ["sequences", "embeddings", "index", "texts", "lists", "vectors compared"]
    header += ["read for a prompt", "million products"]
    return table(header, lines)


@generated
def many_prompts_by_ray() -> str:
    """Of the newest build that ran them."""
    found = find("cpu", op="many prompts by Ray")
    last = [row for row in found if row["commit"] == found[-1]["commit"]]
    lines = [
        [
            row["provider"].removeprefix("hullkit, ").replace("1 workers", "1 worker"),
            f"{float(row['p50']):.1f}",
        ]
        for row in last
    ]
    return table(["100 prompts, 10 updates each", "s"], lines) + "\n\n" + source(last[-1])
