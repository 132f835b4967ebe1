# SPDX-License-Identifier: Apache-2.0
"""One pass over a long text, and its memory: `python -m bench.ops.long_texts`. On a GPU only.

Random weights and random tokens; bfloat16 passes, two updates with the gradient. Both ways to keep
activations must find one loss, the model's own where its logits fit.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from pathlib import Path
from typing import Any

import hullkit
import torch
from rich.console import Console

from bench.harness.losses import agree, untrained
from bench.harness.rows import append, row
from bench.ops.model_sizes import CASES, SHAPES, build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=["smollm2"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 16384, 65536])
    parser.add_argument("--case", choices=list(CASES), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, metavar="CSV", help="append the rows to this file")
    arguments = parser.parse_args()
    device, console = torch.device("cuda", 0), Console(width=160)
    for name in arguments.models:
        shape = SHAPES[name]
        case = CASES[arguments.case]
        model: Any
        model, _ = build(shape, case, device)
        model.config.max_position_embeddings = max(arguments.tokens)
        options: dict[str, Any] = {"precision": "bf16"} if case.precision == "bf16" else {}
        for tokens in arguments.tokens:
            ids = torch.randint(shape.vocabulary, (tokens,))
            # Of long texts the model's own logits may not fit.
            wanted = [untrained(model, ids)] if tokens <= 4096 else []
            for activations in ("keep", "recompute"):
                tuner = hullkit.TestTimeFinetuner(model, activations=activations, **options)
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                times = []
                try:
                    for _ in range(arguments.rounds + 1):
                        torch.cuda.synchronize()
                        began = time.perf_counter()
                        with tuner.adapted([ids], [2]):
                            pass
                        torch.cuda.synchronize()
                        times.append(1e3 * (time.perf_counter() - began))
                        assert tuner.last_report is not None
                        agree(tuner.last_report.losses, wanted)
                        wanted = wanted or tuner.last_report.losses
                    report = tuner.last_report
                    path = "failed" if report is None else report.path
                    words = "" if report is None or report.reason is None else report.reason
                except torch.OutOfMemoryError:
                    path, words = "out of memory", ""
                peak = torch.cuda.max_memory_reserved() / 2**20
                middle = statistics.median(times[1:]) if times[1:] else float("nan")
                console.print(
                    f"{shape.name} {tokens} tokens, {activations}: {middle:.0f} ms a query of one "
                    f"pass, peak {peak / 1024:.1f} GiB, {path} {words}"
                )
                if arguments.out is not None and times[1:]:
                    found = row(
                        "finetune a long text", f"hullkit, {activations}, {path}",
                        f"{shape.name} tokens={tokens} passes=1 updates=2", case.dtype, times[1:],
                        device, peak_mb=round(peak),
                    )  # fmt: skip
                    append(arguments.out, [found])
                tuner.release()
                del tuner


if __name__ == "__main__":
    main()
