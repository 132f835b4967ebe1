# SPDX-License-Identifier: Apache-2.0
"""What the threads of a CPU call are used for, and what they leave undone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HELPERS = str(Path(__file__).parents[1] / "helpers")
TASKS = Path("/proc/self/task")


def run(script: str, **environment: str) -> str:
    paths = os.pathsep.join(filter(None, (HELPERS, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


_STARTED = """
import os, torch, hullkit
torch.set_num_threads(8)
pool, query = torch.randn(3, 40, 16), torch.randn(3, 16)
def started(call):
    before = len(os.listdir("/proc/self/task"))
    call()
    return len(os.listdir("/proc/self/task")) - before
print(started(lambda: hullkit.sift(pool[0], query[0], 9)), started(CALL))
"""


@pytest.mark.skipif(not TASKS.exists(), reason="threads are counted as Linux lists them")
@pytest.mark.parametrize(
    "call",
    [
        "hullkit.sift(pool, query, 9)",
        "hullkit.select(pool, query, 9)",
        "hullkit.frank_wolfe(pool, query)",
        "hullkit.duplicates(pool, eps=0.1)",
        "hullkit.lmo(pool, query)",
        "hullkit.knn(pool, query, 2)",
    ],
)
def test_a_few_small_queries_run_side_by_side(call: str) -> None:
    """Also where there are more threads than queries. A small query alone is not worth a thread."""
    assert run(_STARTED.replace("CALL", f"lambda: {call}")).split() == ["0", "2"]
