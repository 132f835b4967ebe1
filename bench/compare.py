# SPDX-License-Identifier: Apache-2.0
"""Two commits side by side: builds both, checks that they answer alike, prints ratios of times.

    python bench/compare.py OLD NEW [--rounds 30] [-k select]

Both are built into a temporary folder, with this environment's build tools. Each runs in a process
of its own, and they take turns, so that a machine that slows down slows both. A case whose outputs
differ is not timed, and the exit status is then 1. Cases are those of bench/ops/registry.py and one
finetuning, as this checkout has them: both commits must have the functions that they call.
A ratio above 1 means that NEW is faster; its 95 % interval is a bootstrap over the rounds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
LEAST_SECONDS = 2e-3  # of one timing: short calls are repeated
RESAMPLES = 2000


def digest(outputs: Any) -> str:
    """Of the bits of every array in nested outputs."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, (tuple, list)):
            for member in value:
                add(member)
        elif value is not None:
            array = np.ascontiguousarray(np.asarray(value))
            found.update(f"{array.dtype}{array.shape}".encode())
            found.update(array.tobytes())

    add(outputs)
    return found.hexdigest()


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """In a worker: every case by name."""
    from bench.ops.registry import cases

    for case in cases():
        for provider, call in case.providers.items():
            if provider.startswith("hullkit"):
                yield f"{case.op} {case.shape} {case.dtype} {provider}", call
    yield "finetune pybytes 2 x 128 tokens", finetuning()


def finetuning() -> Callable[[], Any]:
    import hullkit
    import torch
    from transformers import AutoModelForCausalLM

    folder = ROOT / "bench" / "assets" / "pybytes"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    examples = [torch.randint(256, (128,), generator=generator) for _ in range(2)]
    tuner = hullkit.TestTimeFinetuner(model, lr=1e-4)

    def call() -> Any:
        with tuner.adapted(examples, [2, 1]) as adapted:
            return [parameter.detach().clone() for parameter in adapted.parameters()]

    return call


def work() -> None:
    """A worker: lines "digest NAME" and "time NAME" come in, JSON goes out."""
    import torch

    torch.set_num_threads(1)
    known = dict(calls())
    print(json.dumps(list(known)), flush=True)
    repeats: dict[str, int] = {}
    for line in sys.stdin:
        order, _, name = line.strip().partition(" ")
        call = known[name]
        if order == "digest":
            print(json.dumps(digest(call())), flush=True)
            continue
        if name not in repeats:
            began = time.perf_counter()
            call()
            repeats[name] = max(1, round(LEAST_SECONDS / (time.perf_counter() - began)))
        began = time.perf_counter()
        for _ in range(repeats[name]):
            call()
        print(json.dumps((time.perf_counter() - began) / repeats[name]), flush=True)


class Worker:
    """A process that runs the cases with one build of hullkit."""

    def __init__(self, build: Path) -> None:
        path = os.pathsep.join([str(build), str(ROOT)])
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            env=os.environ | {"PYTHONPATH": path, "OMP_WAIT_POLICY": "PASSIVE"},
            cwd=build,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.names: list[str] = self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("error: a commit's cases failed; its message is above")
        return json.loads(line)

    def ask(self, order: str, name: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{order} {name}\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def build(commit: str, into: Path) -> Path:
    """The commit's package, in a folder for PYTHONPATH."""
    source, target = into / "source", into / "package"
    source.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", str(source)], input=archive.stdout, check=True)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps"]
    subprocess.run([*command, "--target", str(target), str(source)], check=True)
    return target


def ratio(old: list[float], new: list[float]) -> tuple[float, float, float]:
    """Of the medians, with its 95 % interval over pairs of rounds."""
    times = np.array([old, new])
    draws = np.random.default_rng(0).integers(len(old), size=(RESAMPLES, len(old)))
    resampled = np.median(times[0][draws], axis=1) / np.median(times[1][draws], axis=1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(np.median(times[0]) / np.median(times[1])), float(low), float(high)


def compare(old: Worker, new: Worker, rounds: int, keyword: str) -> bool:
    """Prints a line for each case; False if outputs of one differ."""
    alike = True
    for name in (n for n in new.names if n in old.names and keyword in n):
        if old.ask("digest", name) != new.ask("digest", name):
            print(f"DIFFERS  {name}")
            alike = False
            continue
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for worker, of in zip((old, new), times, strict=True):
                of.append(worker.ask("time", name))
        middle, low, high = ratio(*times)
        milliseconds = f"{1e3 * float(np.median(times[0])):.4f} -> {1e3 * np.median(times[1]):.4f}"
        print(f"{middle:6.3f} [{low:.3f}, {high:.3f}]  {milliseconds} ms  {name}", flush=True)
    return alike


def main() -> None:
    if "--worker" in sys.argv:
        work()
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("old", help="a commit")
    parser.add_argument("new", help="a commit")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("-k", default="", metavar="WORDS", help="only cases whose name has them")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        builds = [
            build(commit, Path(folder) / name)
            for name, commit in (("old", arguments.old), ("new", arguments.new))
        ]
        workers = [Worker(path) for path in builds]
        alike = compare(*workers, arguments.rounds, arguments.k)
        for worker in workers:
            worker.close()
    if not alike:
        sys.exit("outputs differ: times of those cases were not compared")


if __name__ == "__main__":
    main()
