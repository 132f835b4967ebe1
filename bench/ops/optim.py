# SPDX-License-Identifier: Apache-2.0
"""Fused optimizers against torch's, on GPT-2 small's 148 tensors: `make bench-optim`.

On a GPU also against the copy bandwidth measured in the same run, with the host's time for a step,
and stochastically rounded halves, of GPT-2 small and of Llama-3.2-1B, against copies of their own
bytes. The gate comes first: updates of our Adam and SGD equal as many of torch's, and so do clipped
ones, sums and halves. Ratios are within the run; providers take turns, so that a machine that slows
down slows all of them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hullkit import build_info, optim
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.harness.rows import append, processor, row

STEPS = (1, 2, 3, 4, 5, 6, 7, 8)
HALF_STEPS = (1, 2, 8)
WORD = 4  # bytes of float32
SGD = {"lr": 1e-2, "momentum": 0.9}
GPT2 = "GPT-2 small, 148 tensors, 124439808 parameters"
LLAMA = "Llama-3.2-1B, 146 tensors, 1235814400 parameters"


def shapes(model: str = GPT2) -> list[tuple[int, ...]]:
    if model == LLAMA:
        width, inner, keys = 2048, 8192, 512
        block = [(width, width), (keys, width), (keys, width), (width, width)]
        block += [(inner, width), (inner, width), (width, inner), (width,), (width,)]
        return [(128256, width), *block * 16, (width,)]
    width = 768
    block = [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(50257, width), (1024, width), *block * 12, (width,), (width,)]


def make(device: str, model: str = GPT2, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator(device).manual_seed(0)

    def draw(shape: tuple[int, ...], scale: float) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(scale).to(dtype)

    params = [nn.Parameter(draw(shape, 0.02)) for shape in shapes(model)]
    for param in params:
        param.grad = draw(tuple(param.shape), 0.01)
    return params


def gate(device: str) -> None:
    """k updates of ours equal k of torch's: parameters and state, within 2e-6.

    Of torch's default: its fused CUDA kernel is further than that from it, and from float64. It
    has 1 - 0.999 in float32, which is off by 1.3e-5. That one, which is timed, is held to 2e-5.
    """
    for k in (1, 3, 8):
        _compare(device, optim.Adam, torch.optim.Adam, k, 2e-6)
    _compare(device, partial(optim.SGD, **SGD), partial(torch.optim.SGD, **SGD), 8, 2e-6)
    _compare(device, optim.Adam, partial(torch.optim.Adam, fused=True), 3, 2e-5)
    fused = partial(torch.optim.SGD, **SGD, fused=True)
    _compare(device, partial(optim.SGD, **SGD), fused, 3, 1e-5)
    _compare(device, partial(optim.Adam, max_grad_norm=1.0), torch.optim.Adam, 2, 1e-5, 1.0)


def _compare(
    device: str, own: Callable[..., Any], theirs: Callable[..., Any], k: int, within: float,
    max_norm: float | None = None,
) -> None:  # fmt: skip
    params, others = make(device), make(device)
    ours, torchs = own(params), theirs(others)
    ours.step(num_steps=k)
    if max_norm is not None:
        # As clip_grad_norm_, whose sum of so many squares is off by 8e-4 in float32 on a CPU.
        squares = sum(float(p.grad.double().square().sum()) for p in others if p.grad is not None)
        for other in others:
            assert other.grad is not None
            other.grad.mul_(max_norm / (squares**0.5 + 1e-6))
    for _ in range(k):
        torchs.step()
    for mine, other in zip(params, others, strict=True):
        pairs = [(mine.detach(), other.detach())]
        for name, state in torchs.state[other].items():
            if isinstance(state, Tensor) and state.ndim:
                pairs.append((ours.state[mine][name], state))
        for a, b in pairs:
            scale = torch.maximum(b.abs(), b.square().mean().sqrt())
            error = ((a - b).abs() / scale).max().item()
            assert error <= within, (own, theirs, k, error)


def gate_halves(device: str, dtype: torch.dtype) -> None:
    """k updates of ours are torch's in float32, rounded up or down, without bias."""
    for k in HALF_STEPS:
        params = make(device, GPT2, dtype)
        others = [nn.Parameter(param.detach().float()) for param in params]
        for param, other in zip(params, others, strict=True):
            assert param.grad is not None
            other.grad = param.grad.float()
        optim.Adam(params, stochastic_rounding=True).step(num_steps=k)
        theirs = torch.optim.Adam(others)
        for _ in range(k):
            theirs.step()
        errors = torch.cat([(a.float() - b).flatten() for a, b in zip(params, others, strict=True)])
        units = torch.cat([b.detach().abs().clamp(2.0**-14).flatten() for b in others])
        units *= torch.finfo(dtype).eps  # at least the distance of neighbours
        assert (errors.abs() <= units + 1e-5 * 1e-3 * k).all(), k  # and 1e-5 of what k updates move
        assert abs((errors / units).mean().item()) <= 1e-3, k


def timed(calls: dict[str, Callable[[], Any]], device: str) -> dict[str, list[float]]:
    """Milliseconds of each, in turns; on a GPU by events around calls queued behind other work."""
    rounds, queued = (15, 8) if device == "cuda" else (9, 1)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            if device == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(4_000_000)  # the host gets ahead: its time is measured apart
                begin.record()
                for _ in range(queued):
                    call()
                end.record()
                torch.cuda.synchronize()
                times[name].append(begin.elapsed_time(end) / queued)
            else:
                start = time.perf_counter()
                call()
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def host_times(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Milliseconds until a call returns while the GPU is busy with other work."""
    times: dict[str, list[float]] = {}
    for name, call in calls.items():
        call()
        times[f"{name} (host)"] = own = []
        for _ in range(10):
            torch.cuda.synchronize()
            torch.cuda._sleep(50_000_000)
            for _ in range(5):
                start = time.perf_counter()
                call()
                own.append(1e3 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return times


def accumulation(params: list[nn.Parameter], dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    into = [torch.zeros_like(param) for param in params]
    grads = [param.grad.to(dtype) for param in params if param.grad is not None]
    optim.accumulate_(into, grads, 0.5)
    for mine, grad in zip(into, grads, strict=True):
        assert torch.equal(mine, 0.5 * grad.float())
    name = str(dtype).removeprefix("torch.")
    calls: dict[str, Callable[[], Any]] = {
        f"hullkit accumulate_ {name}": lambda: optim.accumulate_(into, grads, 0.5)
    }
    if dtype is torch.float32:
        calls["torch _foreach_add_"] = lambda: torch._foreach_add_(into, grads, alpha=0.5)
    return calls


def measure(device: str) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    params = make(device)
    calls: dict[str, Callable[[], Any]] = {}
    if device == "cuda":
        half = sum(param.numel() for param in params) * 7 // 2
        source: Tensor = torch.empty(half, device=device)
        target = torch.empty_like(source)
        calls["copy of 7 words"] = lambda: target.copy_(source)
    ours, theirs = optim.Adam(params), torch.optim.Adam(params, fused=True)
    calls["torch fused Adam"] = theirs.step
    calls["torch fused Adam, 4 updates"] = lambda: [theirs.step() for _ in range(4)]
    for k in STEPS:
        calls[f"hullkit Adam k={k}"] = lambda k=k: ours.step(num_steps=k)
    clipping = optim.Adam(params, max_grad_norm=1.0)
    calls["hullkit Adam k=2, clipped"] = lambda: clipping.step(num_steps=2)
    sgd = optim.SGD(params, lr=0.0, momentum=0.9)  # lr 0: parameters stay of one size
    torch_sgd = torch.optim.SGD(params, lr=0.0, momentum=0.9, fused=True)
    calls["torch fused SGD, momentum"] = torch_sgd.step
    calls["hullkit SGD k=4, momentum"] = lambda: sgd.step(num_steps=4)
    for dtype in (torch.float32, torch.bfloat16):
        calls |= accumulation(params, dtype)
    calls["torch foreach Adam"] = torch.optim.Adam(params, foreach=True).step
    hosts = {name: calls[name] for name in ("torch fused Adam", "hullkit Adam k=2")}
    return timed(calls, device), host_times(hosts) if device == "cuda" else {}


def measure_halves(model: str, dtype: torch.dtype) -> dict[str, list[float]]:
    params = make("cuda", model, dtype)
    source = torch.empty(7 * sum(param.numel() for param in params), device="cuda", dtype=dtype)
    source, target = source.chunk(2)  # a copy reads one half and writes the other
    calls: dict[str, Callable[[], Any]] = {"copy of its bytes": lambda: target.copy_(source)}
    adam = optim.Adam(params, lr=1e-5, stochastic_rounding=True)
    for k in HALF_STEPS:
        calls[f"hullkit Adam k={k}, stochastic"] = lambda k=k: adam.step(num_steps=k)
    return timed(calls, "cuda")


def half_bars(times: dict[str, list[float]]) -> list[tuple[str, float, str, bool]]:
    p50 = {provider: statistics.median(values) for provider, values in times.items()}
    copy = p50.pop("copy of its bytes")
    return [
        (f"{provider} / copy of its bytes", median / copy, "<= 1.25", median <= 1.25 * copy)
        for provider, median in p50.items()
    ]


def bars(device: str, p50: dict[str, float]) -> list[tuple[str, float, str, bool]]:
    """(what, figure, bar, met)"""
    fused = p50["torch fused Adam"]
    found = []
    if device == "cuda":
        copy = p50["copy of 7 words"]
        worst = max(p50[f"hullkit Adam k={k}"] for k in STEPS) / copy
        found.append(("slowest k = 1..8 / copy of 7 words", worst, "<= 1.25", worst <= 1.25))
        for k, least in ((2, 1.8), (8, 6.0)):
            gain = k * fused / p50[f"hullkit Adam k={k}"]
            found.append((f"{k} torch fused updates / k={k}", gain, f">= {least}", gain >= least))
        for dtype, words in (("float32", 3.0), ("bfloat16", 2.5)):
            share = words / 7 * copy / p50[f"hullkit accumulate_ {dtype}"]
            found.append(
                (f"accumulate_ {dtype}, of copy bandwidth", share, ">= 0.85", share >= 0.85)
            )
        host = 1e3 * p50["hullkit Adam k=2 (host)"]
        found.append(("host time of a step, us", host, "<= 100", host <= 100))
    else:
        for k, most in ((1, 1.0), (4, 1.4)):
            ratio = p50[f"hullkit Adam k={k}"] / fused
            found.append((f"k={k} / one torch fused update", ratio, f"<= {most}", ratio <= most))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--out", type=Path, metavar="CSV", help="append the rows to this file")
    parser.add_argument("--halves", action="store_true", help="only half precision (CUDA)")
    arguments = parser.parse_args()
    device = arguments.device
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    console = Console(width=120)
    rows: list[dict[str, Any]] = []

    def report(
        times: dict[str, list[float]], shape: str, dtype: torch.dtype,
        judged: list[tuple[str, float, str, bool]],
    ) -> None:  # fmt: skip
        word = str(dtype).removeprefix("torch.")
        table = Table(title=f"ms on {name}, {word}" + ", two threads" * (device == "cpu"))
        for column in ("provider", "p50 ms"):
            table.add_column(column, justify="left" if column == "provider" else "right")
        for provider, values in times.items():
            found = row(
                "optimizer step", provider, shape, word, values, device, simd=build_info()["simd"]
            )
            table.add_row(provider, f"{found['p50']:.3f}")
            rows.append(found)
        console.print(shape, table)
        for what, figure, bar, met in judged:
            console.print(f"{'met' if met else 'MISSED'}: {what}: {figure:.2f} (bar {bar})")

    if not arguments.halves:
        gate(device)
        times, hosts = measure(device)
        times |= hosts
        medians = {provider: statistics.median(values) for provider, values in times.items()}
        report(times, GPT2, torch.float32, bars(device, medians))
    if device == "cuda":
        for dtype in (torch.bfloat16, torch.float16):
            gate_halves(device, dtype)
            for model in (GPT2, LLAMA):
                times = measure_halves(model, dtype)
                report(times, model, dtype, half_bars(times))
    if arguments.out is not None:
        append(arguments.out, rows)


if __name__ == "__main__":
    main()
