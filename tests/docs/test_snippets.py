# SPDX-License-Identifier: Apache-2.0
"""Every Python block of the README and of the pages runs as it stands, from the root.

Blocks of a page share one namespace, in order. A `text` block behind one is what it prints.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", re.DOTALL | re.MULTILINE)


def pages_with_python() -> list[str]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [str(page.relative_to(ROOT)) for page in pages if BLOCK.search(page.read_text())]


def test_the_pages_that_should_have_snippets_have_them() -> None:
    guides = ("select", "finetune", "half_precision", "optimizers", "drop_in")
    wanted = {"README.md", *(f"docs/guides/{guide}.md" for guide in guides)}
    assert wanted <= set(pages_with_python())


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT
@pytest.mark.parametrize("page", pages_with_python())
def test_snippets(
    page: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    text = (ROOT / page).read_text()
    namespace: dict[str, object] = {}
    for found in BLOCK.finditer(text):
        capsys.readouterr()
        above = "\n" * (text.count("\n", 0, found.start()) + 1)  # errors name the page's line
        exec(compile(above + found[1], page, "exec"), namespace)
        if found[2] is not None:
            assert capsys.readouterr().out == found[2]
