# SPDX-License-Identifier: Apache-2.0
"""What long use costs and what hits it: adaptations and selections without end, Ctrl-C, the fuzzer.

    python -m bench.quality.reliability ctrl-c                        # each appends its rows
    python -m bench.quality.reliability fuzzer build/fuzz.log         # of a `make fuzz`
    python -m bench.quality.reliability adaptations --count 100000 --trained last
    python -m bench.quality.reliability gpu-adaptations --count 10000
    python -m bench.quality.reliability gpu-selections --count 10000000

Ctrl-C ends a long one early; its rows say how far it came. A row is a check with what was counted:
a figure that must stay what it is, and how often.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from pathlib import Path

import torch

from bench.harness.rows import RESULTS, append, commit, processor
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


def fuzzer(log: str) -> Figures:
    units = int(re.findall(r"number_of_executed_units: (\d+)", log)[-1])
    seconds = int(re.findall(r"in (\d+) second", log)[-1])
    return [
        {"figure": "calls", "value": units, "unit": "calls", "count": 1},
        {"figure": "seconds", "value": seconds, "unit": "s", "count": 1},
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "reliability.csv")
    checks = parser.add_subparsers(dest="check", required=True)
    checks.add_parser("ctrl-c").add_argument("--rounds", type=int, default=3, help="of each call")
    checks.add_parser("fuzzer").add_argument("log", type=Path, help="what make fuzz printed")
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
        found = fuzzer(args.log.read_text())
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
