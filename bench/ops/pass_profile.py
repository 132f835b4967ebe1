# SPDX-License-Identifier: Apache-2.0
"""The kernels of one captured pass, by kind: `python -m bench.ops.pass_profile`.

Prints how many kernels a pass has and how long they run; on a CUDA device only. Passes overlap
their updates, so the kernels' times add up to more than the pass takes.
"""

from __future__ import annotations

import argparse
import gc
from collections import defaultdict
from pathlib import Path
from typing import Any

import hullkit
import torch
from rich.console import Console
from rich.table import Table

from bench.harness.rows import append, row
from bench.ops.finetune import COUNTS, timed
from bench.ops.model_sizes import CASES, SHAPES, build

MODELS = {"gpt2": "float32", "smollm2": "float32", "llama-1b": "bfloat16"}
# The first kind with a word that a kernel's name contains.
KINDS = {
    "products with Adam": ("adam_product",),
    "Adam": ("adam_",),
    "loss": ("cross_entropy",),
    "attention": ("flash", "fmha", "attention", "attn"),
    "matrix products": ("gemm", "cutlass", "nvjet", "splitk", "cublas"),
    "norms": ("norm",),
    "copies and casts": ("memcpy", "memset", "copy", "catarray", "fill"),
    "sums": ("reduce",),
}


def kind_of(kernel: str) -> str:
    lower = kernel.lower()
    return next((k for k, words in KINDS.items() if any(w in lower for w in words)), "elementwise")


def profile(tuner: hullkit.TestTimeFinetuner, examples: list[torch.Tensor]) -> list[Any]:
    """The CUDA events of one query."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as recorded:
        with tuner.adapted(examples, COUNTS):
            pass
        torch.cuda.synchronize()
    return [e for e in recorded.events() if e.device_type == torch.autograd.DeviceType.CUDA]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(MODELS))
    parser.add_argument("--case", choices=list(CASES), help="default: by model")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--kernels", action="store_true", help="also every kernel by its name")
    parser.add_argument("--out", type=Path, metavar="CSV", help="append the rows to this file")
    arguments = parser.parse_args()
    device, console = torch.device("cuda", 0), Console(width=160)
    passes = sum(-(-count // 2) for count in COUNTS)
    for name in arguments.models:
        shape, case = SHAPES[name], CASES[arguments.case or MODELS.get(name, "bfloat16")]
        model, _ = build(shape, case, device)
        options = {"precision": "bf16"} if case.precision == "bf16" else {}
        tuner = hullkit.TestTimeFinetuner(model, **options)
        examples = [torch.randint(shape.vocabulary, (arguments.tokens,)) for _ in COUNTS]

        def query(tuner: Any = tuner, examples: Any = examples) -> None:
            with tuner.adapted(examples, COUNTS):
                pass

        query()
        milliseconds = sorted(timed(query, device, 7))[3] / passes
        counts: dict[str, int] = defaultdict(int)
        times: dict[str, float] = defaultdict(float)
        kernels: dict[str, list[float]] = defaultdict(list)
        for event in profile(tuner, examples):
            spent = float(event.device_time)  # microseconds
            kind = kind_of(event.name)
            counts[kind] += 1
            times[kind] += spent
            kernels[event.name].append(spent)
        table = Table(
            title=f"{shape.name}, {case.trained}, {milliseconds:.2f} ms a pass, "
            f"{sum(counts.values()) / passes:.0f} kernels"
        )
        for heading in ("kind", "kernels", "microseconds"):
            table.add_column(heading)
        for kind in sorted(times, key=lambda kind: -times[kind]):
            table.add_row(kind, f"{counts[kind] / passes:.1f}", f"{times[kind] / passes:.0f}")
        console.print(table)
        if arguments.kernels:
            for kernel, spent in sorted(kernels.items(), key=lambda item: -sum(item[1])):
                console.print(
                    f"{sum(spent) / passes:8.1f} us {len(spent) / passes:7.1f} x "
                    f"{sum(spent) / len(spent):7.2f} {kernel[:150]}",
                    highlight=False,
                    no_wrap=True,
                )
        if arguments.out is not None:
            rows = [
                row(
                    "pass profile", f"hullkit, {case.trained}, {kind}",
                    f"{shape.name} tokens={arguments.tokens} kernels={counts[kind] / passes:.1f}",
                    case.dtype, [spent_by_kind / passes], device, unit="us", rounds=passes,
                )
                for kind, spent_by_kind in times.items()
            ]  # fmt: skip
            append(arguments.out, rows)
        del query, tuner, model
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
