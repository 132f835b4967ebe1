# SPDX-License-Identifier: Apache-2.0
"""Prompts a second, many at once: `python -m bench.ops.many_prompts`.

Models of published shapes with random weights in bfloat16, or in 4 bits by bitsandbytes. A prompt:
50 updates with 30 gradients on texts of 400 tokens. Beside PromptBatch's slots, one prompt after
the other: TestTimeFinetuner with an adapter of the same rank and, in bfloat16, all weights; PEFT
and torch without our kernels, eager and as CUDA graphs (bench/rivals/peft_lora.py). Graphs of
passes are recorded before. With --scored each adapted model then scores a text of as many tokens,
with --generated it continues a prompt of 48 tokens greedily by 128; PEFT alone is left out then.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hullkit
import torch
from hullkit.prompt_batch import Generate, Score

from bench.harness.losses import agree
from bench.harness.rows import append, row
from bench.ops.finetune import timed
from bench.ops.model_sizes import CASES, COUNTS, SHAPES, build, release
from bench.rivals.peft_lora import Captured, Eager

RANK = 16
PROMPT, CONTINUATION = 48, 128  # tokens
EAGER, GRAPHS = "PEFT, LoRA r=16", "PEFT, LoRA r=16, CUDA graphs"


class Found:
    """The losses and scores of every query, as the first way found them. All ways start from one
    model, with adapters that add zero, and so must find them again before they are timed. Closer
    bounds, on a real model, are those of bench.quality.many_prompts."""

    def __init__(self) -> None:
        self._losses: dict[int, list[float]] = {}
        self._scores: dict[int, float] = {}

    def check(
        self, query: int, losses: Sequence[float], value: Any = None, passes: int | None = None
    ) -> None:
        """AssertionError if a pass is lost, or if the score or one of the first `passes` (default:
        all) differs.

        value: of the query's `then`. Tokens that random weights continue a prompt with hang on
        rounding, so that only their number is looked at.
        """
        if len(losses) != len(COUNTS):
            raise AssertionError(f"expected {len(COUNTS)} losses, got {len(losses)}")
        agree(losses, self._losses.setdefault(query, [*losses])[:passes])
        if isinstance(value, float):
            agree([value], [self._scores.setdefault(query, value)])
        elif value is not None and value.numel() != CONTINUATION:
            raise AssertionError(f"expected {CONTINUATION} tokens, got {value.numel()}")


def by_torch(model: Any, queries: list[Any], found: Found, captured: bool) -> Callable[[], None]:
    examples, counts = queries[0]
    rival = Captured(model, len(examples[0])) if captured else Eager(model)
    return lambda: found.check(0, rival(examples, counts))


def alone(model: Any, queries: list[Any], found: Found, all_weights: bool) -> Callable[[], None]:
    tuner = hullkit.TestTimeFinetuner(model)

    def run(query: int = 0) -> None:
        examples, counts, *uses = queries[query]
        value = None
        with tuner.adapted(examples, counts):
            for then in uses:
                value = then(model)
        assert tuner.last_report is not None
        if all_weights:  # they learn more than adapters
            found.check(query, tuner.last_report.losses, passes=1)
        else:
            found.check(query, tuner.last_report.losses, value)

    for query in () if all_weights else range(len(queries)):
        run(query)  # what a slot among others must find
    return run


def together(model: Any, queries: list[Any], found: Found, slots: int) -> Callable[[], None]:
    batch = hullkit.PromptBatch(model, slots=slots, rank=RANK)

    def run() -> None:
        for answer in batch.map(queries[:slots]):
            if answer.error is not None:
                raise answer.error
            found.check(answer.place, answer.losses, answer.value)

    return run


def rest(then: str, size: int, length: tuple[int], random: torch.Generator) -> list[Any]:
    """Of a query, after its counts: what the adapted model does."""
    if then == "scored":
        return [Score(torch.randint(size, length, generator=random))]
    if then == "generated":
        prompt = torch.randint(size, (PROMPT,), generator=random)
        # None ends early, whatever token a random model takes.
        new = {"max_new_tokens": CONTINUATION, "min_new_tokens": CONTINUATION}
        return [Generate(prompt, **new, do_sample=False, pad_token_id=0)]
    return []


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--models", default="smollm2,llama-1b,mistral-7b")
    parser.add_argument("--base", choices=("bfloat16", "nf4"), default="bfloat16")
    parser.add_argument("--slots", default="1,8,32,64")
    parser.add_argument("--tokens", type=int, default=400)
    uses = parser.add_mutually_exclusive_group()
    uses.add_argument("--scored", action="store_true", help="adapted models score a text")
    uses.add_argument("--generated", action="store_true", help="adapted models continue a prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shrink", type=int, default=1, help="sizes divided by about so much")
    parser.add_argument("--seconds", type=float, default=170.0, help="no row begins after so many")
    parser.add_argument("--out", type=Path, metavar="CSV", help="append the rows to this file")
    arguments = parser.parse_args(argv)
    then = "scored" * arguments.scored + "generated" * arguments.generated
    device = torch.device(arguments.device)
    cuda = device.type == "cuda"
    began, rows = time.perf_counter(), []
    for name in arguments.models.split(","):
        shape = SHAPES[name].shrunk(arguments.shrink) if arguments.shrink > 1 else SHAPES[name]
        four_bits = arguments.base == "nf4"
        runs: list[tuple[str, str, int]] = []
        if not then:
            runs += [(EAGER, "lora-bfloat16", 1)]
            runs += [(GRAPHS, "lora-bfloat16", 1)] if cuda else []
        runs += [("TestTimeFinetuner, LoRA r=16", "lora-bfloat16", 1)]
        if not four_bits:
            runs += [("TestTimeFinetuner, all weights", "bfloat16", 1)]
        runs += [("PromptBatch r=16", "bfloat16", int(k)) for k in arguments.slots.split(",")]
        found = Found()
        most = max(slots for *_, slots in runs)
        for provider, case, slots in runs:
            if time.perf_counter() - began > arguments.seconds:
                continue
            release(device)
            random = torch.Generator().manual_seed(0)
            size, length = shape.vocabulary, (arguments.tokens,)
            queries: list[Any] = []
            for _ in range(most):
                examples = [torch.randint(size, length, generator=random) for _ in COUNTS]
                queries.append((examples, COUNTS, *rest(then, size, length, random)))
            rates: list[float] = []
            try:
                model, _ = build(shape, CASES[case], device, four_bits)
                if provider in (EAGER, GRAPHS):
                    run = by_torch(model, queries, found, provider == GRAPHS)
                elif provider.startswith("PromptBatch"):
                    run = together(model, queries, found, slots)
                else:
                    run = alone(model, queries, found, case == "bfloat16")
                run()  # records, compiles
                rates = [1e3 * slots / ms for ms in timed(run, device, arguments.rounds)]
            except RuntimeError as error:
                provider += ", " + str(error).splitlines()[0][:60].replace(",", ";")
            peak = torch.cuda.max_memory_reserved(device) if cuda else None
            run = model = None
            made = row(
                "many prompts", provider,
                f"{shape.name} slots={slots} tokens={arguments.tokens} updates={sum(COUNTS)} "
                f"gradients={len(COUNTS)}" + (f" {then}" if then else ""),
                arguments.base, rates, device, unit="prompts/s", given=argv,
                peak_mb="" if peak is None else round(peak / 2**20),
            )  # fmt: skip
            print(provider, made["shape"], made["p50"], made["peak_mb"], flush=True)
            rows.append(made)
            if arguments.out is not None:
                append(arguments.out, [made])
    return rows


if __name__ == "__main__":
    main()
