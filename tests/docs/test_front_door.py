# SPDX-License-Identifier: Apache-2.0
"""The README is short, its links lead somewhere, and the version is said once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"]


def slug(heading: str) -> str:
    """The anchor that a renderer makes of a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", text):
        path, _, anchor = (target[0] or target[1]).partition("#")
        if path.startswith("https:"):
            continue
        assert (ROOT / path).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), target


def test_version_is_said_once() -> None:
    """In pyproject.toml: C++, Python, the wheel and the release's tag take it from there."""
    project = (ROOT / "pyproject.toml").read_text()
    version = re.findall(r'^version = "(.*)"$', project, re.MULTILINE)
    assert len(version) == 1
    assert f"## [{version[0]}]" in (ROOT / "CHANGELOG.md").read_text()
