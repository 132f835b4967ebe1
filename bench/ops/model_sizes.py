# SPDX-License-Identifier: Apache-2.0
"""Which model fits in what, and how long a query takes: `python -m bench.ops.model_sizes`.

Models of the published shapes with random weights, one at a time. A query: 50 updates with 30
gradients on texts of 400 tokens, then the base weights are back. PYTHONPATH may point at another
build of hullkit (name it by --label): nothing is passed to it that older ones lack.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hullkit
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from bench.harness.four_bits import quantize_
from bench.harness.losses import agree, fingerprint, untrained
from bench.harness.rows import append, processor, row
from bench.ops.finetune import synchronize, timed

COUNTS = [2] * 20 + [1] * 10


class Shape(NamedTuple):
    """As in the config.json that the model is published with."""

    name: str
    kind: str  # model_type of transformers
    layers: int
    width: int
    inner: int  # of the MLP
    heads: int
    key_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    def shrunk(self, by: int) -> Shape:
        """A model like it, everything divided by about as much."""
        key_heads = max(1, self.key_heads // by)
        heads = key_heads * (self.heads // self.key_heads)
        head_dim = max(8, self.head_dim // by // 2 * 2)
        return self._replace(
            layers=max(1, self.layers // by),
            width=heads * head_dim,
            inner=max(16, self.inner // by),
            heads=heads,
            key_heads=key_heads,
            head_dim=head_dim,
            vocabulary=max(64, self.vocabulary // by),
        )

    def config(self) -> Any:
        from transformers import AutoConfig

        shared = {"vocab_size": self.vocabulary, "tie_word_embeddings": self.tied}
        shared |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
        if self.kind == "gpt2":
            return AutoConfig.for_model(
                "gpt2", n_embd=self.width, n_inner=self.inner, n_layer=self.layers,
                n_head=self.heads, **shared,
            )  # fmt: skip
        if self.kind == "mistral":
            shared["sliding_window"] = None  # since version 0.2
        return AutoConfig.for_model(
            self.kind, hidden_size=self.width, intermediate_size=self.inner,
            num_hidden_layers=self.layers, num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads, head_dim=self.head_dim,
            max_position_embeddings=4096, **shared,
        )  # fmt: skip


SHAPES = {
    "gpt2": Shape("GPT-2 124M", "gpt2", 12, 768, 3072, 12, 12, 64, 50257, True),
    "smollm2": Shape("SmolLM2-135M", "llama", 30, 576, 1536, 9, 3, 64, 49152, True),
    "qwen-0.5b": Shape("Qwen2.5-0.5B", "qwen2", 24, 896, 4864, 14, 2, 64, 151936, True),
    "llama-1b": Shape("Llama-3.2-1B", "llama", 16, 2048, 8192, 32, 8, 64, 128256, True),
    "gemma-2b": Shape("Gemma-2-2B", "gemma2", 26, 2304, 9216, 8, 4, 256, 256000, True),
    "llama-3b": Shape("Llama-3.2-3B", "llama", 28, 3072, 8192, 24, 8, 128, 128256, True),
    "phi-3-mini": Shape("Phi-3-mini 3.8B", "phi3", 32, 3072, 8192, 32, 32, 96, 32064, False),
    "mistral-7b": Shape("Mistral-7B", "mistral", 32, 4096, 14336, 32, 8, 128, 32000, False),
}
LARGE = ("gemma-2b", "llama-3b", "phi-3-mini", "mistral-7b")  # their copy may go to the host


class Case(NamedTuple):
    trained: str
    dtype: torch.dtype  # of the base weights
    snapshot: str = "device"

    @property
    def precision(self) -> str:
        return "bf16" if self.dtype is torch.float32 else "default"


CASES = {
    "float32": Case("all", torch.float32),
    "float32-host": Case("all", torch.float32, "host"),
    "bfloat16": Case("all", torch.bfloat16),
    "bfloat16-host": Case("all", torch.bfloat16, "host"),
    "lora-float32": Case("LoRA r=16", torch.float32),
    "lora-bfloat16": Case("LoRA r=16", torch.bfloat16),
}


class Measured(NamedTuple):
    parameters: int | None = None  # adapters not counted
    first: float | None = None  # seconds: with what is recorded once
    times: tuple[float, ...] = ()  # ms
    peak: int | None = None  # bytes
    path: str = ""


def build(
    shape: Shape, case: Case, device: torch.device, four_bits: bool = False
) -> tuple[nn.Module, int]:
    """The model, made where it runs, and its number of parameters."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with device:
        model: Any = AutoModelForCausalLM.from_config(shape.config(), dtype=case.dtype)
    parameters = sum(p.numel() for p in model.parameters())
    if four_bits:
        quantize_(model)
    if case.trained != "all":
        import peft

        # PEFT's defaults: adapters in float32 whatever the base weights are in.
        config = peft.LoraConfig(
            r=16,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            fan_in_fan_out=shape.kind == "gpt2",
        )
        model = peft.get_peft_model(model, config)
    return model.eval(), parameters


def measure(shape: Shape, case: Case, device: torch.device, tokens: int, rounds: int) -> Measured:
    """Never raises for a model that does not fit: `path` says so."""
    parameters = first = None
    try:
        model, parameters = build(shape, case, device)
        generator = torch.Generator().manual_seed(0)
        examples = [torch.randint(shape.vocabulary, (tokens,), generator=generator) for _ in COUNTS]
        options = {"precision": "bf16"} if case.precision == "bf16" else {}
        tuner = hullkit.TestTimeFinetuner(model, snapshot=case.snapshot, **options)

        def query() -> None:
            with tuner.adapted(examples, COUNTS):
                pass

        wanted, before = untrained(model, examples[0]), fingerprint(model)
        release(device)  # what building left behind
        first = timed(query, device, 1)[0] / 1e3
        assert tuner.last_report is not None
        agree(tuner.last_report.losses, [wanted])
        query()
        times = timed(query, device, rounds)
        report = tuner.last_report
        assert report is not None
        path = report.path if report.reason is None else f"{report.path}: {report.reason}"
        peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
        if fingerprint(model) != before:  # after the peak is read
            raise AssertionError("expected the weights of before, got others")
        return Measured(parameters, first, tuple(times), peak, path)
    except (RuntimeError, FloatingPointError) as error:  # torch.OutOfMemoryError is the former
        # Only the words are kept: the traceback holds the model.
        memory = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()
        reason = "" if memory else f": {type(error).__name__}: {str(error).splitlines()[0]}"
        return Measured(parameters, first, path="out of memory" if memory else f"failed{reason}")


def release(device: torch.device) -> None:
    """The next model finds the memory empty, and its peak is its own."""
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def csv_rows(
    shape: Shape, case: Case, found: Measured, label: str, device: torch.device,
    given: Sequence[str] | None, tokens: int,
) -> list[dict[str, Any]]:  # fmt: skip
    provider = f"{label}, {case.trained}, {case.precision} passes, {case.snapshot} snapshot"
    provider += f", {found.path}"
    words = f"{shape.name} parameters={found.parameters or '?'} tokens={tokens} "
    words += f"updates={sum(COUNTS)} gradients={len(COUNTS)}"
    peak = "" if found.peak is None else round(found.peak / 2**20)

    def of(op: str, values: Sequence[float], unit: str) -> dict[str, Any]:
        return row(
            op, provider, words, case.dtype, values, device, unit=unit, given=given, peak_mb=peak
        )

    rows = [of("finetune by size", found.times, "ms")]
    if found.times and found.first is not None:
        rows.append(of("finetune by size, first query", [found.first], "s"))
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def names(known: Sequence[str]) -> Any:
        def chosen(text: str) -> list[str]:
            for name in text.split(","):
                if name not in known:
                    raise argparse.ArgumentTypeError(
                        f"expected some of {','.join(known)}, got {name!r}"
                    )
            return text.split(",")

        return chosen

    def positive(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
        return int(text)

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--models", type=names(list(SHAPES)), default=list(SHAPES))
    parser.add_argument(
        "--cases",
        type=names(list(CASES)),
        help=f"of {','.join(CASES)}; default: all, -host for models of 2B and more only",
    )
    parser.add_argument("--tokens", type=positive, default=400)
    parser.add_argument("--rounds", type=positive, default=5, help="queries timed")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="no row begins after so many"
    )
    parser.add_argument(
        "--shrink", type=positive, default=1, metavar="N", help="sizes divided by about N"
    )
    parser.add_argument("--label", default="hullkit", help="of the build, in the rows")
    parser.add_argument("--out", type=Path, metavar="CSV", help="append the rows to this file")
    arguments = parser.parse_args(argv)
    if arguments.tokens < 2:
        parser.error(f"--tokens: expected at least 2, got {arguments.tokens}")
    return arguments


def main(argv: Sequence[str] | None = None) -> list[Measured]:
    arguments = parse(argv)
    device = torch.device(arguments.device)
    cuda = device.type == "cuda"
    on = torch.cuda.get_device_name() if cuda else processor()
    console = Console(width=160)
    table = Table(
        "model", "parameters", "trained", "weights", "passes", "snapshot", "ms a query",
        "first query s", "peak GiB", "path", title=f"{arguments.label} on {on}",
    )  # fmt: skip
    began, results = time.perf_counter(), []
    for model in arguments.models:
        shape = SHAPES[model]
        if arguments.shrink > 1:
            shape = shape.shrunk(arguments.shrink)._replace(
                name=f"{shape.name} / {arguments.shrink}"
            )
        for name, case in CASES.items():
            wanted = arguments.cases or (case.snapshot == "device" or model in LARGE)
            if wanted is False or (wanted is not True and name not in wanted):
                continue
            if time.perf_counter() - began > arguments.seconds:
                console.print(f"{shape.name}, {name}: left out, {arguments.seconds:g} s are over")
                continue
            release(device)
            found = measure(shape, case, device, arguments.tokens, arguments.rounds)
            release(device)
            results.append(found)
            middle = sorted(found.times)[len(found.times) // 2] if found.times else None
            cells = [
                shape.name,
                "" if found.parameters is None else f"{found.parameters / 1e6:,.1f}M",
                case.trained,
                str(case.dtype).removeprefix("torch."),
                case.precision,
                case.snapshot,
                "" if middle is None else f"{middle:.1f}",
                "" if found.first is None else f"{found.first:.2f}",
                "" if found.peak is None else f"{found.peak / 2**30:.2f}",
                found.path,
            ]
            table.add_row(*cells)
            console.print(" | ".join(cells), highlight=False)  # as it comes: a run may be cut off
            if arguments.out is not None:
                label, tokens = arguments.label, arguments.tokens
                append(arguments.out, csv_rows(shape, case, found, label, device, argv, tokens))
    console.print(table)
    return results


if __name__ == "__main__":
    main()
