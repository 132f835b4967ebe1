# SPDX-License-Identifier: Apache-2.0
"""What a package says about itself: the licence of each source, and what the wheel contains.

`make supply-chain` proves what takes longer: builds without network, from odd folders, twice.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("bench", "csrc", "docs", "examples", "python", "tests", "triton_kernels")
COMMENT = {".py": "#", ".pyi": "#", ".cpp": "//", ".h": "//", ".cu": "//", ".cuh": "//"}


def test_every_source_names_its_licence() -> None:
    sources = [
        path for room in ROOMS for path in (ROOT / room).rglob("*") if path.suffix in COMMENT
    ]
    assert len(sources) > 300
    for path in sources:
        first = path.read_text().partition("\n")[0]
        wanted = f"{COMMENT[path.suffix]} SPDX-License-Identifier: Apache-2.0"
        assert first == wanted, f"{path.relative_to(ROOT)} begins with {first!r}"
