# SPDX-License-Identifier: Apache-2.0
"""Calls that would take hours, of every loop that may be long, each ended by Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

CALLS = {
    "frank_wolfe": "hullkit.frank_wolfe(pool, query, max_iters=10**12, tol=0.0)",
    "frank_wolfe, batch": "hullkit.frank_wolfe(pool, queries, max_iters=10**12, tol=0.0)",
    "frank_wolfe, large pool": "hullkit.frank_wolfe(large, long, max_iters=10**9, tol=0.0)",
    "frank_wolfe, capped": "hullkit.frank_wolfe(pool, query, max_iters=10**12, tol=0.0, "
    "max_weight=0.3)",
    "sift": "hullkit.sift(pool, query, 10**7)",
    "duplicates, large pool": "hullkit.duplicates(large, eps=1e-9)",
    # The first prompt's error is there long before; Ctrl-C must not get lost behind it.
    "error in a batch": "hullkit.frank_wolfe(torch.stack([pool / 0, pool]), queries[:2], "
    "max_iters=10**12, tol=0.0)",
}
PROGRAM = """
import signal, sys, time, torch, hullkit
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
torch.manual_seed(0)
torch.set_num_threads(2)
pool, query = torch.randn(2000, 64), torch.randn(64)
queries = query.repeat(8, 1)
large, long = torch.randn(100_000, 256), torch.randn(256)
for call in sys.argv[1:]:
    print("ready", flush=True)
    try:
        eval(call)
        print("finished", flush=True)
    except KeyboardInterrupt:
        print(time.time(), hullkit.lmo(pool, query).index >= 0, flush=True)
"""


def answers(wait: float = 0.5, rounds: int = 1) -> Iterator[tuple[str, float]]:
    """Each call's name, and the seconds from Ctrl-C to KeyboardInterrupt, `rounds` times.

    Raises:
        RuntimeError: a call ends by itself or not at all, or the library does not work after it.
    """
    names = [name for name in CALLS for _ in range(rounds)]
    command = [sys.executable, "-c", PROGRAM, *(CALLS[name] for name in names)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        watchdog = threading.Timer(60 + 5 * len(names), process.kill)
        watchdog.start()
        try:
            for name in names:
                process.stdout.readline()  # ready
                time.sleep(wait)
                sent = time.time()
                process.send_signal(signal.SIGINT)
                heard, works = [*process.stdout.readline().split(), "", ""][:2]
                if works != "tensor(True)":
                    raise RuntimeError(f"{name}: expected KeyboardInterrupt, got {heard!r}")
                yield name, float(heard) - sent
        finally:
            watchdog.cancel()
            process.kill()
