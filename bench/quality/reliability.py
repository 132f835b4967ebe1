# SPDX-License-Identifier: Apache-2.0
"""What long use costs and what hits it: each check appends its rows.

    python -m bench.quality.reliability ctrl-c            # in calls without end
    python -m bench.quality.reliability fuzzer            # make fuzz
    python -m bench.quality.reliability state-machines    # make fuzz-python
    python -m bench.quality.reliability faults            # signals and errors at every moment
    python -m bench.quality.reliability hostile           # calls with arguments that do not fit
    python -m bench.quality.reliability concurrency       # threads, forks, workers, signals
    python -m bench.quality.reliability sanitizers        # make sanitize-cpu
    python -m bench.quality.reliability supply-chain      # make supply-chain, and its tests
    python -m bench.quality.reliability adaptations --count 100000 --trained last
    python -m bench.quality.reliability gpu-adaptations --count 10000
    python -m bench.quality.reliability gpu-selections --count 10000000
    python -m bench.quality.reliability gpu-sanitizers    # make sanitize, in parts side by side
    python -m bench.quality.reliability collect FILE...   # rows of runs side by side

Ctrl-C ends the three long ones early; their rows say how far they came. A row is a check with what
was counted: a figure that must stay what it is, and how often.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
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


def said_by(*command: str) -> tuple[str, float]:
    """What a command printed, which is shown too, and its seconds. An error ends the program."""
    start = time.monotonic()
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: failed")
    return "".join(lines), time.monotonic() - start


def _counted(what: str, count: int, seconds: float) -> Figures:
    shared = {"count": 1}
    return [
        {"figure": what, "value": count, "unit": what, **shared},
        {"figure": "seconds", "value": round(seconds), "unit": "s", **shared},
    ]


def fuzzer(seconds: int, clang: str) -> Figures:
    said, _ = said_by("make", "fuzz", f"FUZZ_SECONDS={seconds}", f"CLANG={clang}")
    [(units, took)] = re.findall(r"Done (\d+) runs in (\d+) second", said)
    return _counted("calls", int(units), int(took))


def state_machines() -> Figures:
    said, took = said_by("make", "fuzz-python")
    return _counted("stories", sum(map(int, re.findall(r"- (\d+) passing, 0 failing", said))), took)


def faults() -> Figures:
    tests = "tests/finetune/test_finetune_signals.py"
    said, took = said_by(sys.executable, "-m", "pytest", "-q", "-rP", tests)
    return _counted(
        "faults", sum(map(int, re.findall(r"^(\d+) moments$", said, re.MULTILINE))), took
    )


HOSTILE = (
    "tests/selection/test_hostile_calls.py",
    "tests/selection/test_errors.py",
    "tests/selection/test_error_options.py",
    "tests/optim/test_optim_errors.py",
    "tests/optim/test_private_entry_points.py",
    "tests/finetune/test_finetune_refusals.py",
)
CONCURRENCY = (
    "tests/selection/test_invariance.py",
    "tests/selection/test_processes.py",
    "tests/optim/test_optim_callers.py",
    "tests/finetune/test_finetune_threads.py",
    "tests/prompt_batch/test_batch_signals.py",
    "tests/prompt_batch/test_prefetch.py",
)


def tests_of(files: tuple[str, ...]) -> Figures:
    said, took = said_by(sys.executable, "-m", "pytest", "-q", *files)
    [passed] = re.findall(r"^(\d+) passed", said, re.MULTILINE)
    return _counted("tests", int(passed), took)


def sanitizers() -> Figures:
    said, took = said_by("make", "sanitize-cpu")
    inputs = sum(map(int, re.findall(r"^(\d+) inputs$", said, re.MULTILINE)))
    tests = sum(map(int, re.findall(r"^(\d+) passed", said, re.MULTILINE)))
    found = _counted("tests", tests, took)
    return [{"figure": "inputs", "value": inputs, "unit": "inputs", "count": 1}, *found]


def gpu_sanitizers(parts: int) -> Figures:
    """Every tool on every part, all at once: each keeps one core busy, and little of the GPU."""
    start = time.monotonic()
    calls = [sys.executable, "tests/helpers/every_call.py"]
    runs = [
        (tool, subprocess.Popen(
            ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *calls, f"{i}/{parts}"],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ))
        for tool in ("racecheck", "initcheck", "memcheck")
        for i in range(parts)
    ]  # fmt: skip
    counted: Counter[str] = Counter()
    for tool, process in runs:
        said, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"{said}{tool}: failed")
        [number] = re.findall(r"^(\d+) calls$", said, re.MULTILINE)
        counted[tool] += int(number)
        print(tool, number, "calls", f"{time.monotonic() - start:.0f} s", flush=True)
    return _counted("calls", counted.total(), time.monotonic() - start)


def supply_chain() -> Figures:
    said, _ = said_by(".ci/supply_chain", sys.executable)
    found = re.findall(r"^ok: (.*): (\d+) (.*)$", said, re.MULTILINE)
    tests = "tests/packaging/test_supply_chain.py"
    said, _ = said_by(sys.executable, "-m", "pytest", "-q", tests)
    [passed] = re.findall(r"^(\d+) passed", said, re.MULTILINE)
    found.append(("licence of every source, bill of materials, no folder's name", passed, "tests"))
    return [{"figure": check, "value": n, "unit": unit, "count": 1} for check, n, unit in found]


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
    others = ("state-machines", "faults", "hostile", "concurrency", "sanitizers", "supply-chain")
    for name in others:
        checks.add_parser(name)
    many = {"adaptations": 10**5, "gpu-adaptations": 10**4, "gpu-selections": 10**7}
    for name, count in many.items():
        checks.add_parser(name).add_argument("--count", type=int, default=count)
    checks.choices["adaptations"].add_argument(
        "--trained", choices=("all", "last"), default="all", help="all weights, or the last layer's"
    )
    checks.add_parser("gpu-sanitizers").add_argument("--parts", type=int, default=8)
    collect = checks.add_parser("collect")
    collect.add_argument("files", type=Path, nargs="+", help="that --out of each run named")
    args = parser.parse_args()
    if args.check == "collect":
        append(args.out, load.of_processes(args.files), FIELDS)
        return
    cuda = args.check.startswith("gpu-")
    shared = {"check": args.check, "torch": torch.__version__, "commit": commit()}
    shared["device"] = torch.cuda.get_device_name() if cuda else processor()
    shared["command"] = "python -m bench.quality.reliability " + " ".join(
        sys.argv[sys.argv.index(args.check) :]
    )
    runs: dict[str, Callable[[], Figures]] = {
        "ctrl-c": lambda: ctrl_c(args.rounds),
        "fuzzer": lambda: fuzzer(args.seconds, args.clang),
        "state-machines": state_machines,
        "faults": faults,
        "hostile": lambda: tests_of(HOSTILE),
        "concurrency": lambda: tests_of(CONCURRENCY),
        "sanitizers": sanitizers,
        "supply-chain": supply_chain,
        "gpu-sanitizers": lambda: gpu_sanitizers(args.parts),
        "adaptations": lambda: load.adaptations(args.count, args.trained),
        "gpu-adaptations": lambda: load.gpu_adaptations(args.count),
        "gpu-selections": lambda: load.gpu_selections(args.count),
    }
    found = runs[args.check]()
    append(args.out, [row | shared for row in found], FIELDS)
    for row in found:
        print(row)


if __name__ == "__main__":
    main()
