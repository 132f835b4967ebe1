# SPDX-License-Identifier: Apache-2.0
"""What long use costs: adaptations one after another, Ctrl-C in long calls, and the fuzzer's count.

    python -m bench.quality.reliability --seconds 330                 # appends rows
    python -m bench.quality.reliability --fuzzed build/fuzz.log       # those of a `make fuzz`

A row is a check with what was counted: a figure that must stay what it is, and how often.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hullkit
import torch
from torch import nn

from bench.demo import language_model
from bench.harness.rows import RESULTS, append, commit, processor

FIELDS = ["check", "figure", "value", "unit", "count", "device", "torch", "commit", "command"]
LENGTHS = (96, 40, 120, 64)
COUNTS = [3, 1, 0, 2]
WARM_UP = 10  # until torch's allocator has what it will use

# Calls that would take hours, of every loop that may be long.
LONG_CALLS = {
    "frank_wolfe": "hullkit.frank_wolfe(pool, query, max_iters=10**12, tol=0.0)",
    "frank_wolfe, batch": "hullkit.frank_wolfe(pool, queries, max_iters=10**12, tol=0.0)",
    "frank_wolfe, large pool": "hullkit.frank_wolfe(large, long, max_iters=10**9, tol=0.0)",
    "frank_wolfe, capped": "hullkit.frank_wolfe(pool, query, max_iters=10**12, tol=0.0, "
    "max_weight=0.3)",
    "sift": "hullkit.sift(pool, query, 10**7)",
    "duplicates, large pool": "hullkit.duplicates(large, eps=1e-9)",
}
SCRIPT = """
import time, torch, hullkit
torch.manual_seed(0)
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


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def digest(model: nn.Module) -> str:
    state = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        state.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return state.hexdigest()


def adaptations(seconds: float) -> list[dict[str, Any]]:
    model = language_model.load(str(language_model.OWN_MODEL), torch.device("cpu")).model
    tuner = hullkit.TestTimeFinetuner(model, lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    before = digest(model)
    times: list[float] = []
    resident: list[int] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        examples = [torch.randint(200, (length,), generator=generator) for length in LENGTHS]
        start = time.perf_counter()
        with tuner.adapted(examples, COUNTS):
            pass
        times.append((time.perf_counter() - start) * 1e3)
        resident.append(resident_bytes())
    count = len(times)
    settled = resident[WARM_UP:]
    half = len(settled) // 2
    grown = max(settled[half:]) - max(settled[:half])
    times.sort()
    figures = [
        ("p50", round(times[count // 2], 2), "ms"),
        ("p99", round(times[count * 99 // 100], 2), "ms"),
        ("bytes grown", grown, "bytes"),  # the most of the second half against the first
        ("base weights changed", int(digest(model) != before), "models"),
    ]
    return [{"figure": f, "value": v, "unit": u, "count": count} for f, v, u in figures]


def answered_after(call: str) -> float:
    """Seconds from the signal to KeyboardInterrupt, after which the library must still work."""
    command = [sys.executable, "-c", SCRIPT.format(call=call)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(1.0)
        sent = time.time()
        process.send_signal(signal.SIGINT)
        heard, works = [*process.communicate(timeout=300)[0].split(), ""][:2]
    if works != "True":  # or it finished before
        raise RuntimeError(f"{call}: expected a library that works after Ctrl-C")
    return float(heard) - sent


def fuzzed(log: str) -> list[dict[str, Any]]:
    units = int(re.findall(r"number_of_executed_units: (\d+)", log)[-1])
    seconds = int(re.findall(r"in (\d+) second", log)[-1])
    return [
        {"figure": "calls", "value": units, "unit": "calls", "count": 1},
        {"figure": "seconds", "value": seconds, "unit": "s", "count": 1},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.0, help="of adaptations")
    parser.add_argument("--rounds", type=int, default=3, help="of Ctrl-C in a long call; 0: none")
    parser.add_argument("--fuzzed", type=Path, help="the output of make fuzz")
    parser.add_argument("--out", type=Path, default=RESULTS / "reliability.csv")
    args = parser.parse_args()
    shared = {"device": processor(), "torch": torch.__version__, "commit": commit()}
    shared["command"] = "python -m bench.quality.reliability " + " ".join(sys.argv[1:])
    rows: list[dict[str, Any]] = []
    if args.fuzzed:
        rows += [{"check": "fuzzer", **row} for row in fuzzed(args.fuzzed.read_text())]
    elif args.rounds:
        for name, call in LONG_CALLS.items():
            worst = max(answered_after(call) for _ in range(args.rounds))
            row = {"figure": name, "value": round(worst, 3), "unit": "s", "count": args.rounds}
            rows.append({"check": "Ctrl-C", **row})
            print(rows[-1], flush=True)
    if args.seconds:
        rows += [{"check": "adaptations", **row} for row in adaptations(args.seconds)]
    append(args.out, [row | shared for row in rows], FIELDS)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
