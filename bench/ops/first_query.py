# SPDX-License-Identifier: Apache-2.0
"""What the first query of a new length costs: `python -m bench.ops.first_query`. On a GPU only.

Recording a pass takes time once for each length. It is stated in eager passes: the first query's
time beyond that of the queries after it, divided by the time of an eager pass. Captured passes must
find the losses of eager ones.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import hullkit
import torch
from rich.console import Console

from bench.harness.losses import agree
from bench.harness.rows import append, row
from bench.ops.model_sizes import CASES, SHAPES, build

MODELS = {"gpt2": "float32", "smollm2": "float32", "llama-1b": "bfloat16"}
LENGTHS = (400, 300, 200, 800)  # the first also loads kernels and makes the optimizer's state


def seconds(tuner: hullkit.TestTimeFinetuner, examples: list[torch.Tensor]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    with tuner.adapted(examples, [2] * len(examples)):  # one pass each
        pass
    torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(MODELS))
    parser.add_argument("--out", type=Path, metavar="CSV", help="append the rows to this file")
    arguments = parser.parse_args()
    device, console = torch.device("cuda", 0), Console(width=160)
    for name in arguments.models:
        shape, case = SHAPES[name], CASES[MODELS.get(name, "bfloat16")]
        model, _ = build(shape, case, device)
        options: dict[str, Any] = {"precision": "bf16"} if case.precision == "bf16" else {}
        eager = hullkit.TestTimeFinetuner(model, capture=False, **options)
        captured = hullkit.TestTimeFinetuner(model, **options)
        for place, tokens in enumerate(LENGTHS):
            torch.manual_seed(tokens)
            examples = [torch.randint(shape.vocabulary, (tokens,)) for _ in range(4)]
            a_pass = sorted(seconds(eager, examples) for _ in range(6))[2] / len(examples)
            assert eager.last_report is not None
            wanted = eager.last_report.losses
            eager.release()
            first = seconds(captured, examples)
            assert captured.last_report is not None
            agree(captured.last_report.losses, wanted)
            after = sorted(seconds(captured, examples) for _ in range(5))[2]
            passes = (first - after) / a_pass
            what = "first of all" if place == 0 else "a new length"
            console.print(
                f"{shape.name}, {tokens} tokens, {what}: {first:.3f} s, then {after:.3f} s; an "
                f"eager pass {1e3 * a_pass:.0f} ms: recording costs {passes:.1f} passes"
            )
            if arguments.out is not None:
                found = row(
                    "recording", f"hullkit, {what}", f"{shape.name} T={tokens}", case.dtype,
                    [passes], device, unit="eager passes",
                )  # fmt: skip
                append(arguments.out, [found])
        captured.release()
        del model, eager, captured


if __name__ == "__main__":
    main()
