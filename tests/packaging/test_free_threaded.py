# SPDX-License-Identifier: Apache-2.0
"""A Python without the GIL: the module does not declare that it needs none."""

from __future__ import annotations

import subprocess
import sys
import sysconfig

import pytest


@pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python has a GIL always"
)
def test_the_import_turns_the_gil_on_and_says_so() -> None:
    lines = "import sys, torch; before = sys._is_gil_enabled(); import hullkit"
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"{lines}; print(before, sys._is_gil_enabled())"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False", "True"]
    assert "has been enabled to load module 'hullkit._core'" in done.stderr
