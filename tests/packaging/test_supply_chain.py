# SPDX-License-Identifier: Apache-2.0
"""What a package says about itself: the licence of each source, and what the wheel contains.

`make supply-chain` proves what takes longer: builds without network, from odd folders, twice.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import tempfile
from pathlib import Path

import hullkit
from hullkit import _core

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


def test_the_wheel_lists_what_it_contains() -> None:
    """PEP 770: a bill of materials beside the metadata."""
    files = importlib.metadata.files("hullkit") or []
    (sbom,) = [file for file in files if file.parent.name == "sboms"]
    assert sbom.parent.parent.name == f"hullkit-{hullkit.__version__}.dist-info"
    bill = json.loads(sbom.read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert bill["metadata"]["component"]["version"] == hullkit.__version__
    linked = ["pybind11"] + ["cudart_static"] * hullkit.build_info()["cuda"]
    assert [part["name"] for part in bill["components"]] == linked
    assert bill["dependencies"] == [{"ref": "hullkit", "dependsOn": linked}]
    for part in bill["components"]:
        assert re.match(r"\d+\.\d+", part["version"]), part
        assert part["licenses"], part


def test_the_module_names_no_folder_of_the_build() -> None:
    content = Path(_core.__file__).read_bytes()
    for folder in (ROOT, Path(tempfile.gettempdir()), Path.home()):
        assert f"{folder}/".encode() not in content, folder
