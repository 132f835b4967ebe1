# SPDX-License-Identifier: Apache-2.0
"""What long use costs and what hits it: each check appends its rows.

    python -m bench.quality.reliability ctrl-c            # in calls without end
    python -m bench.quality.reliability fuzzer            # make fuzz
    python -m bench.quality.reliability state-machines    # make fuzz-python
    python -m bench.quality.reliability sanitizers        # make sanitize-cpu
    python -m bench.quality.reliability adaptations --count 100000 --trained last
    python -m bench.quality.reliability gpu-adaptations --count 10000
    python -m bench.quality.reliability gpu-selections --count 10000000

Ctrl-C ends the last three early; their rows say how far they came. A row is a check with what was
counted: a figure that must stay what it is, and how often.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.harness.rows import RESULTS, ROOT, append, commit, processor
from bench.quality import endless_calls, load
from bench.quality.load import Figures

FIELDS = ["check", "figure", "value", "unit", "count", "device", "torch", "commit", "command"]


def ctrl_c(rounds: int) -> Figures:
    found: Figures = []
    for name, answered in itertools.groupby(endless_calls.answers(1.0, rounds), lambda x: x[0]):
        worst = max(seconds for _, seconds in answered)
        found.append({"figure": name, "value": round(worst, 3), "unit": "s", "count": rounds})
        print(found[-1], flush=True)
    return found


def made(*target: str) -> tuple[str, float]:
    """What `make` printed, which is shown too, and its seconds. An error ends the program."""
    start = time.monotonic()
    command = ["make", "-C", str(ROOT), *target]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise SystemExit(f"make {' '.join(target)}: failed")
    return "".join(lines), time.monotonic() - start


def _counted(what: str, count: int, seconds: float) -> Figures:
    shared = {"count": 1}
    return [
        {"figure": what, "value": count, "unit": what, **shared},
        {"figure": "seconds", "value": round(seconds), "unit": "s", **shared},
    ]


def fuzzer(seconds: int, clang: str) -> Figures:
    said, _ = made("fuzz", f"FUZZ_SECONDS={seconds}", f"CLANG={clang}")
    [(units, took)] = re.findall(r"Done (\d+) runs in (\d+) second", said)
    return _counted("calls", int(units), int(took))


def state_machines() -> Figures:
    said, took = made("fuzz-python")
    return _counted("stories", sum(map(int, re.findall(r"(\d+) passing examples", said))), took)


def sanitizers() -> Figures:
    said, took = made("sanitize-cpu")
    inputs = sum(map(int, re.findall(r"^(\d+) inputs$", said, re.MULTILINE)))
    tests = sum(map(int, re.findall(r"^(\d+) passed", said, re.MULTILINE)))
    found = _counted("tests", tests, took)
    return [{"figure": "inputs", "value": inputs, "unit": "inputs", "count": 1}, *found]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "reliability.csv")
    checks = parser.add_subparsers(dest="check", required=True)
    checks.add_parser("ctrl-c").add_argument("--rounds", type=int, default=3, help="of each call")
    fuzz = checks.add_parser("fuzzer")
    fuzz.add_argument("--seconds", type=int, default=600)
    fuzz.add_argument("--clang", default="clang++")
    checks.add_parser("state-machines")
    checks.add_parser("sanitizers")
    many = {"adaptations": 10**5, "gpu-adaptations": 10**4, "gpu-selections": 10**7}
    for name, count in many.items():
        checks.add_parser(name).add_argument("--count", type=int, default=count)
    checks.choices["adaptations"].add_argument(
        "--trained", choices=("all", "last"), default="all", help="all weights, or the last layer's"
    )
    args = parser.parse_args()
    cuda = args.check.startswith("gpu-")
    shared = {"check": args.check, "torch": torch.__version__, "commit": commit()}
    shared["device"] = torch.cuda.get_device_name() if cuda else processor()
    shared["command"] = "python -m bench.quality.reliability " + " ".join(sys.argv[1:])
    if args.check == "ctrl-c":
        found = ctrl_c(args.rounds)
    elif args.check == "fuzzer":
        found = fuzzer(args.seconds, args.clang)
    elif args.check == "state-machines":
        found = state_machines()
    elif args.check == "sanitizers":
        found = sanitizers()
    elif args.check == "adaptations":
        found = load.adaptations(args.count, args.trained)
    elif args.check == "gpu-adaptations":
        found = load.gpu_adaptations(args.count)
    else:
        found = load.gpu_selections(args.count)
    append(args.out, [row | shared for row in found], FIELDS)
    for row in found:
        print(row)


if __name__ == "__main__":
    main()
