# SPDX-License-Identifier: Apache-2.0
"""Writes the generated blocks of README.md and of the results pages from the rows of bench/results.

    python docs/tables.py            # rewrite them
    python docs/tables.py --check    # fail where one differs from what the rows say

A block lies between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a function that is marked
`@generated`, in one of the files `*_tables.py` here.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import architecture_tables
import finetuning_tables
import many_prompts_tables
import model_size_tables
import optimizer_tables
import reach_tables
import reliability_tables
import scaling_tables
import selection_tables
import ttft_tables
from rows import ROOT, TABLES

BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
# Importing them fills TABLES.
SOURCES = (
    selection_tables,
    finetuning_tables,
    model_size_tables,
    many_prompts_tables,
    optimizer_tables,
    architecture_tables,
    scaling_tables,
    ttft_tables,
    reliability_tables,
    reach_tables,
)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def rewritten(text: str) -> str:
    """The page with every block as the rows have it. KeyError for a name that nobody generates."""
    return BLOCK.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)


def main() -> None:
    stale = [page for page in pages() if rewritten(page.read_text()) != page.read_text()]
    for page in stale:
        print(page.relative_to(ROOT))
        if "--check" not in sys.argv:
            page.write_text(rewritten(page.read_text()))
    if stale and "--check" in sys.argv:
        sys.exit("these pages differ from bench/results: run `python docs/tables.py`")


if __name__ == "__main__":
    main()
