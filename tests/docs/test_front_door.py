# SPDX-License-Identifier: Apache-2.0
"""The README is short, its links lead somewhere, and the version is said once."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"")
PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"]


def slug(heading: str) -> str:
    """The anchor that a renderer makes of a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in LINK.findall(text):
        path, _, anchor = (target[0] or target[1]).partition("#")
        if path.startswith("https:"):
            continue
        assert (ROOT / path).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), target


def test_links_lead_somewhere_from_a_package_index() -> None:
    """Where no file lies beside the page. The workflow that builds packages makes them so."""
    script = runpy.run_path(str(ROOT / "docs" / "absolute_links.py"))
    text = (ROOT / "README.md").read_text()
    made = script["with_absolute_links"](text, "https://host/owner/name", "v1")
    assert len(made.splitlines()) == len(text.splitlines())
    links, relative = LINK.findall(made), 0
    for (page, file), (was_page, was_file) in zip(links, LINK.findall(text), strict=True):
        if (was_page or was_file).startswith("https:"):
            assert (page, file) == (was_page, was_file)
            continue
        relative += 1
        assert page == (was_page and f"https://host/owner/name/blob/v1/{was_page}")
        assert file == (was_file and f"https://host/owner/name/raw/v1/{was_file}")
    assert relative > 20
    workflow = ROOT / ".github" / "workflows" / "packages.yml"
    if not workflow.exists():  # in an sdist
        return
    for job in workflow.read_text().partition("\njobs:\n")[2].split("\n\n"):
        before, built, _ = re.split(r"(-m build|cibuildwheel@)", job, maxsplit=1)
        assert "docs/absolute_links.py" in before, built


def test_version_is_said_once() -> None:
    """In pyproject.toml: C++, Python, the wheel and the release's tag take it from there. The
    change log and the citation, which nothing builds, say the same."""
    project = (ROOT / "pyproject.toml").read_text()
    version = re.findall(r'^version = "(.*)"$', project, re.MULTILINE)
    assert len(version) == 1
    assert f"## [{version[0]}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {version[0]}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_extra_is_explained() -> None:
    """And whatever an example imports is in an extra, or said to be missing from them."""
    project = (ROOT / "pyproject.toml").read_text()
    section = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = dict(re.findall(r"^(\w+) = (\[.*?\]$)", section, re.MULTILINE | re.DOTALL))
    page = (ROOT / "docs" / "install.md").read_text().partition("## Optional packages")[2]
    assert set(re.findall(r"\[(\w+)\]", page)) == set(extras)
    brought = set(re.findall(r'"([a-z]+)', extras["demo"] + extras["ray"]))
    brought |= {"hullkit", "numpy", "torch", "passages", "pyarrow", "__future__"}  # pyarrow: Ray's
    for path in sorted((ROOT / "examples").glob("*.py")):
        imported: set[str] = set()
        for node in ast.parse(path.read_text()).body:  # it can do without the rest
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
        for name in imported - brought - sys.stdlib_module_names:
            assert f"`{name}`" in page, (path.name, name)


def test_every_room_is_named() -> None:
    page = (ROOT / "docs" / "internals.md").read_text()
    for file in (ROOT / "python" / "hullkit").glob("*/__init__.py"):
        assert f"  {file.parent.name}/ " in page, file.parent.name
