# SPDX-License-Identifier: Apache-2.0
"""An nvcc that is too old: AUTO builds without CUDA and says why, ON stops."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs CMake")
@pytest.mark.parametrize("wanted", ["AUTO", "ON"])
def test_old_nvcc(tmp_path: Path, wanted: str) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.5, V11.5.119'\n")
    nvcc.chmod(0o755)
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), f"-DHULLKIT_CUDA={wanted}"]
    command += [f"-DCMAKE_CUDA_COMPILER={nvcc}", "-DHULLKIT_PYTHON=OFF"]
    command += ["-DSKBUILD_PROJECT_VERSION=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = " ".join((done.stdout + done.stderr).split())
    assert "of CUDA 11.5; 11.8 is the oldest that fits" in said
    assert (done.returncode == 0) is (wanted == "AUTO")
    if wanted == "AUTO":
        assert "CUDA OFF" in said
