# SPDX-License-Identifier: Apache-2.0
"""Which interpreters, libraries, compilers and processors hullkit was tried on; appends rows.

    python -m bench.quality.reach python                        # this interpreter and what it has
    python -m bench.quality.reach compilers g++-11 clang++-14   # those that are there
    python -m bench.quality.reach processors                    # emulated: .ci/emulate

Nothing is appended where a test fails. `python` tests the installed package.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from bench.harness.rows import RESULTS, ROOT, append, commit, processor

FIELDS = ["kind", "what", "passed", "unit", "numpy", "torch", "triton", "simd", "device"]
FIELDS += ["commit", "command"]
# Each operation, the optimizers with their Triton kernels interpreted, and finetuning.
TESTS = [
    *(f"tests/selection/test_{name}.py" for name in ("lmo", "knn", "duplicates", "frank_wolfe")),
    *(f"tests/selection/test_{name}.py" for name in ("round_multiplicities", "select", "sift")),
    *(f"tests/selection/test_{name}.py" for name in ("ops", "arrays", "arguments")),
    *(f"tests/optim/test_{name}.py" for name in ("optim", "accumulate", "stochastic_rounding")),
    "tests/optim/test_private_entry_points.py",
    *(f"tests/finetune/test_finetune{name}.py" for name in ("", "_restore", "_threads")),
    *(f"tests/packaging/test_{name}.py" for name in ("free_threaded", "supply_chain")),
]
SEEDS = sorted(str(path) for path in (ROOT / "csrc" / "fuzz" / "seeds").iterdir())
Row = dict[str, object]


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)[:200]}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def this_python() -> list[Row]:
    import hullkit

    free = "t" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        run(sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *TESTS)
        (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    passed = int(suite.attrib["tests"]) - int(suite.attrib["skipped"])
    row: Row = {"what": f"Python {platform.python_version()}{free}", "passed": passed}
    row |= {name: version(name) for name in ("numpy", "torch", "triton")}
    return [row | {"unit": "tests", "simd": hullkit.build_info()["simd"]}]


def compilers(names: list[str]) -> list[Row]:
    rows: list[Row] = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            options = ["-DHULLKIT_PYTHON=OFF", "-DHULLKIT_CUDA=OFF", "-DSKBUILD_PROJECT_VERSION=0"]
            options += [f"-DCMAKE_CXX_COMPILER={name}", "-DHULLKIT_WARNINGS_AS_ERRORS=ON"]
            run("cmake", "-S", ".", "-B", folder, *options)
            targets = ("check_simd", "fuzz_selection")
            run("cmake", "--build", folder, "--parallel", "2", "--target", *targets)
            sets = re.findall(r"^(\w+): \d+ checks", run(f"{folder}/check_simd"), re.MULTILINE)
            inputs = re.findall(r"(\d+) inputs", run(f"{folder}/fuzz_selection", *SEEDS))
        what = run(name, "--version").partition("\n")[0]
        rows.append({"what": re.sub(r" \(.*\)", "", what), "passed": inputs[0], "unit": "inputs"})
        rows[-1]["simd"] = " ".join(sets)
    return rows


def processors() -> list[Row]:
    rows: list[Row] = []
    for line in run(".ci/emulate").splitlines():
        found = re.match(r"(\w+ [\w-]+): (.*); (\d+) inputs$", line)
        if found:
            what, checks, inputs = found.groups()
            sets = " ".join(re.findall(r"(\w+): \d+ checks", checks))
            rows.append({"what": what, "passed": inputs, "unit": "inputs", "simd": sets})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality.reach",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("kind", choices=["python", "compilers", "processors"])
    parser.add_argument("names", nargs="*", metavar="NAME", help="a compiler")
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS / "reach.csv",
        metavar="CSV",
        help="append the rows to this file; default: bench/results/reach.csv",
    )
    args = parser.parse_args()
    at = commit()  # of the sources that the tests begin with
    if args.kind == "python":
        rows = this_python()
    else:
        rows = compilers(args.names) if args.kind == "compilers" else processors()
    command = " ".join(["python -m bench.quality.reach", args.kind, *args.names])
    shared: Row = {"kind": args.kind, "device": processor(), "commit": at, "command": command}
    append(args.out, [row | shared for row in rows], FIELDS)


if __name__ == "__main__":
    main()
