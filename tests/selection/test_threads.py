# SPDX-License-Identifier: Apache-2.0
"""What the threads of a CPU call are used for, and what they leave undone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import hullkit
import pytest
import torch

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


def test_ctrl_c_is_heard_while_neighbours_are_sorted() -> None:
    pool, query = torch.randn(6_000_000, 1), torch.ones(1)
    heard = []
    torch.set_num_threads(1)
    previous = signal.signal(signal.SIGALRM, lambda *_: heard.append(time.monotonic()))
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    try:
        hullkit.knn(pool, query, len(pool))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert len(heard) >= 4, "handlers run where the call looks whether it shall end"


_PLACED = """
import ctypes, os, torch, hullkit
torch.set_num_threads(2)
pool, query = torch.randn(8, 40, 16), torch.randn(8, 16)
processor = ctypes.CDLL(None).sched_getcpu
masks = lambda: {int(t): os.sched_getaffinity(int(t)) for t in os.listdir("/proc/self/task")}
def placed():
    before = masks() if not workers else {}
    for _ in range(50):
        at = processor()
        hullkit.sift(pool, query, 9)
        workers.extend(set(masks()) - set(before) if before else [])
        before = {}
        if at == processor():  # else the caller has moved meanwhile
            return at, masks()[workers[0]]
workers = []
"""
_PINNED = """
both = sorted(os.sched_getaffinity(0))[:2]
os.sched_setaffinity(0, both[:1])
assert placed() == (both[0], {both[0]})
os.sched_setaffinity(0, both)
at, mask = placed()
assert mask == set(both) - {at}, (both, at, mask)
"""
_BOUND = """
a = torch.randn(600, 600)
a @ a  # OpenMP has threads now, each of a processor
own = os.sched_getaffinity(0)
everywhere = set().union(*masks().values())
if len(own) == 1 and len(everywhere) > 1:
    assert placed()[1] == everywhere - own
    print("bound")
"""
two_processors = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="a thread can be placed on one of two processors only where there are two",
)


@two_processors
def test_workers_follow_a_caller_that_was_pinned_for_a_while() -> None:
    run(_PLACED + _PINNED)


@two_processors
def test_workers_have_processors_of_their_own_where_openmp_binds_its_threads() -> None:
    if "bound" not in run(_PLACED + _BOUND, OMP_PROC_BIND="true", OMP_NUM_THREADS="2"):
        pytest.skip("this torch does not bind its threads")
