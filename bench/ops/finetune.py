# SPDX-License-Identifier: Apache-2.0
"""One query of test-time finetuning against the published procedure: `make bench-finetune`.

Adapt and put the weights back: 50 updates with 30 gradients. GPT-2 small with random weights, or
the model in --model; texts of 400 and of 1024 tokens on a GPU, of their natural length on a CPU.
The gate comes first: without dropout our weights after a query are the published procedure's, and
all our ways find the same losses.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hullkit
import torch
from hullkit.language_model.interface import token_limits
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.harness.losses import agree
from bench.harness.rows import append, processor, row
from bench.rivals import published

COUNTS = [9, 7, 6, 5, 5, 4, 3, 3, 2, 2, 1, 1, 1, 1]
OURS: dict[str, dict[str, Any]] = {
    "hullkit eager": {"capture": False},
    "hullkit": {},
    "hullkit, tf32": {"precision": "tf32"},
    "hullkit, bf16": {"precision": "bf16"},
    "hullkit, bf16, host snapshot": {"precision": "bf16", "snapshot": "host"},
    "hullkit, bf16 compiled": {"precision": "bf16", "compile": True},
}
BARS = {400: {"hullkit": 3.0, "hullkit, tf32": 5.0, "hullkit, bf16": 7.0}}
BARS[1024] = {"hullkit": 1.35, "hullkit, tf32": 2.0, "hullkit, bf16": 3.0}


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config())


def load(path: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(query: Callable[[], Any], device: torch.device, rounds: int) -> list[float]:
    times = []
    for _ in range(rounds):
        synchronize(device)
        began = time.perf_counter()
        query()
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - began))
    return times


def naive(
    model: nn.Module, examples: list[Tensor], state: dict[str, Tensor], **options: Any
) -> None:
    published.finetune(model, examples, COUNTS, **options)
    published.restore(model, state)


def ours(tuner: hullkit.TestTimeFinetuner, examples: list[Tensor]) -> None:
    with tuner.adapted(examples, COUNTS):
        pass


def gate(
    model: nn.Module,
    examples: list[Tensor],
    state: dict[str, Tensor],
    names: list[str],
    **options: Any,
) -> dict[str, float]:
    """Relative distances (2-norm of all weights): ours to the published procedure's; captured to
    eager ones on texts that capture does not lengthen, for the same kernels in both. All `names`
    must find the losses of the eager float32 passes."""

    def weights() -> Tensor:
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a - b).norm() / b.norm())

    losses: dict[str, list[float]] = {}

    def adapted(name: str, texts: list[Tensor]) -> Tensor:
        tuner = hullkit.TestTimeFinetuner(model, **OURS[name])
        with tuner.adapted(texts, COUNTS):
            changed = weights()
        assert tuner.last_report is not None
        losses[name] = tuner.last_report.losses
        return changed

    published.finetune(model, examples, COUNTS, dropout=False, **options)
    wanted = weights()
    published.restore(model, state)
    eager = adapted("hullkit eager", examples)
    distances = {"eager to published": apart(eager, wanted)}
    assert distances["eager to published"] <= 1e-4, distances
    for name in names:  # weights that reduced precision moves differ; what they learn does not
        adapted(name, examples)
        agree(losses[name], losses["hullkit eager"])
    if next(model.parameters()).is_cuda:
        distances["captured to eager, lengthened"] = apart(adapted("hullkit", examples), eager)
        length = len(examples[0]) // 32 * 32
        shorter = [ids[:length] for ids in examples]
        eager = adapted("hullkit eager", shorter)
        distances["eager to itself"] = apart(adapted("hullkit eager", shorter), eager)
        distances["captured to eager"] = apart(adapted("hullkit", shorter), eager)
        assert distances["captured to eager"] <= 1e-5, distances
    return distances


def measure(
    model: nn.Module, length: int, names: list[str], rounds: int, console: Console
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Milliseconds of a query and peak MB, by provider."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(length)
    vocabulary = token_limits(model).vocabulary or 256
    examples = [torch.randint(vocabulary, (length,), generator=generator) for _ in COUNTS]
    options = {} if device.type == "cuda" else {"max_length": None}
    state = published.base_state(model)
    for name, distance in gate(model, examples, state, names, **options).items():
        bar = f", bar 1e-5 {'met' if distance <= 1e-5 else 'MISSED'}" if "captured" in name else ""
        console.print(f"{length} tokens, weights after a query, {name}: {distance:.1e}{bar}")
    times: dict[str, list[float]] = {}
    peak: dict[str, float] = {}

    tuners = {name: hullkit.TestTimeFinetuner(model, **OURS[name]) for name in names}
    queries = {"published": partial(naive, model, examples, state, **options)}
    queries |= {name: partial(ours, tuner, examples) for name, tuner in tuners.items()}
    if device.type != "cuda":  # in turns: a machine that slows down slows all of them
        for query in queries.values():
            query()
        for _ in range(rounds):
            for name, query in queries.items():
                times.setdefault(name, []).extend(timed(query, device, 1))
        return times, peak
    for name, query in queries.items():  # one after the other: each alone in memory
        gc.collect()  # what the one before left in cycles is not this one's memory,
        torch._C._cuda_clearCublasWorkspaces()  # nor are workspaces on its streams
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        query()
        synchronize(device)
        console.print(f"{length} tokens, {name}: first query {time.perf_counter() - began:.1f} s")
        query()
        times[name] = timed(query, device, rounds if name == "published" else 2 * rounds)
        peak[name] = torch.cuda.max_memory_reserved() / 2**20
        if name in tuners:
            console.print(f"{length} tokens, {name}: {tuners[name].last_report.seconds}")
            tuners[name].release()
    return times, peak


def restoring(model: nn.Module) -> tuple[float, float]:
    """ms of the fused restore and state reset, and of copying as many bytes."""
    from hullkit.finetune.base_weights import Weights
    from hullkit.finetune.rounding import rounding_of
    from hullkit.language_model.pass_copies import PassCopies

    parameters = list(model.parameters())
    rounding = rounding_of(model, "nearest", 0)
    weights = Weights(parameters, host=False, copies=PassCopies([]), rounding=rounding)
    weights.save()
    words = sum(p.numel() for p in parameters)
    source = torch.zeros(2 * words, device="cuda")  # 4 words a parameter: read, three written
    target = torch.empty_like(source)

    def of(call: Callable[[], Any]) -> float:
        found = []
        for _ in range(15):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(4_000_000)
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            found.append(begin.elapsed_time(end))
        return statistics.median(found)

    return of(weights.restore), of(lambda: target.copy_(source))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--model", type=Path, help="a folder; default: GPT-2's shape")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of a text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--providers", nargs="+", choices=list(OURS), help="default: all")
    parser.add_argument("--out", type=Path, metavar="CSV", help="append the rows to this file")
    arguments = parser.parse_args()
    console = Console(width=140)
    device = torch.device(arguments.device)
    cuda = device.type == "cuda"
    named = gpt2() if arguments.model is None else load(arguments.model)
    model = named.to(device)
    shape = "GPT-2 small" if arguments.model is None else arguments.model.name
    name = torch.cuda.get_device_name() if cuda else processor()
    on_cpu = ["hullkit eager", "hullkit, bf16", "hullkit, bf16 compiled"]
    rows, lines = [], []
    table = Table(
        "tokens", "provider", "ms a query", "times published", "peak MB", title=f"on {name}"
    )
    for length in arguments.lengths or ([400, 1024] if cuda else [256]):
        names = arguments.providers or (list(OURS) if cuda else on_cpu)
        times, peak = measure(model, length, names, arguments.rounds, console)
        base = statistics.median(times["published"])
        for provider, values in times.items():
            ratio = base / statistics.median(values)
            held = f"{peak[provider]:.0f}" if provider in peak else ""
            table.add_row(
                str(length), provider, f"{statistics.median(values):.1f}", f"{ratio:.2f}", held
            )
            bar = BARS.get(length, {}).get(provider) if cuda and shape == "GPT-2 small" else None
            if not cuda and "bf16" in provider:
                lines.append((f"{provider}, {length} tokens", ratio, ratio >= 1.5, ">= 1.5"))
            if bar is not None:
                lines.append((f"{provider}, {length} tokens", ratio, ratio >= bar, f">= {bar}"))
                share = peak[provider] / peak["published"]
                what = f"{provider}, {length} tokens, peak memory of published"
                lines.append((what, share, share <= 0.65, "<= 0.65"))
            rows.append(
                row(
                    "finetune", provider, f"{shape} tokens={length} updates=50 gradients=30",
                    "float32", values, device,
                    peak_mb=round(peak[provider]) if provider in peak else "",
                )
            )  # fmt: skip
    if cuda:
        took, copied = restoring(model)
        share = took / copied
        lines.append((f"restore and reset {took:.3f} ms, of a copy", share, share <= 1.3, "<= 1.3"))
    console.print(table)
    for what, figure, met, bar in lines:
        console.print(f"{'met' if met else 'MISSED'}: {what}: {figure:.2f} (bar {bar})")
    if arguments.out is not None:
        append(arguments.out, rows)


if __name__ == "__main__":
    main()
