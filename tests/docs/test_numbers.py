# SPDX-License-Identifier: Apache-2.0
"""Every number of the README and of the results pages comes from a row.

Numbers in generated blocks are compared with the rows by test_tables.py. Outside of them only these
kinds of numbers may stand: they say what was done, not what came out.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "results").glob("*.md"))]

# Removed before numbers are looked for.
NOT_PROSE = [
    r"<!-- table: \w+ -->.*?<!-- end -->",
    r"<!--.*?-->",
    r"^```.*?^```",  # code and what it prints: test_snippets.py runs it
    r"\]\([^)]*\)",  # targets of links
    r"`[^`]*[A-Za-z_][^`]*`",  # names, calls and commands
]
EXEMPT = [
    r"\bGPT-2 124M\b",
    r"\b[A-Za-z]+[-_]?\d[\w.]*(-\d+(\.\d+)?[BM])?",  # float32, GPT-2, SmolLM2-135M
    r"C\+\+\d+",
    r"(?<=\b[nd] = )\d+",  # sizes of a problem
    r"(?<=\brank )\d+",
    r"(?<=\btotal )\d+",
    r"\b\d+\s+(?:updates|gradients|queries|candidates|prompts|tokens|tensors)\b",
    r"\b\d+ of each corpus\b",
    r"\b4\.0M parameters\b",  # the demo's model: bench/assets/pybytes/MODEL_CARD.md
    r"\b7 words for each parameter\b",  # what Adam must read and write
    r": 1 is\s+the floor",
]
NUMBER = re.compile(r"(?<![\w.])[-+±]?\d[\d.,]*")


def untraced(text: str) -> list[str]:
    """Numbers, with some of what stands around them, that no rule explains."""
    for pattern in NOT_PROSE:
        text = re.sub(pattern, " ", text, flags=re.DOTALL | re.MULTILINE)
    for pattern in EXEMPT:
        text = re.sub(pattern, " ", text)
    return [text[max(0, n.start() - 30) : n.end() + 20] for n in NUMBER.finditer(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_number_has_a_row(page: Path) -> None:
    assert untraced(page.read_text()) == []


@pytest.mark.parametrize(
    "sentence",
    [
        "It takes 0.149 ms on another host.",
        "The ratio is 94x.",
        "| float32 | 442 | 3.0x |",
        "about 8 % better",
        "within 6e-7 of it",
        "`0.72` ms",
        "2 min",
    ],
)
def test_a_figure_is_found(sentence: str) -> None:
    assert untraced(sentence)
