"""Calls that would take hours, of every loop that may be long, and a program that makes one."""

from __future__ import annotations

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
import time, torch, hullkit
torch.manual_seed(0)
torch.set_num_threads(2)
pool, query = torch.randn(2000, 64), torch.randn(64)
queries = query.repeat(8, 1)
large, long = torch.randn(100_000, 256), torch.randn(256)
print("ready", flush=True)
try:
    {call}
    print("finished")
except KeyboardInterrupt:
    print(time.time(), bool(hullkit.lmo(pool, query).index >= 0))
"""


def program(call: str) -> str:
    """It prints "ready", then the time of Ctrl-C and whether the library works after it."""
    return PROGRAM.format(call=call)
