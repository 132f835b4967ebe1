# SPDX-License-Identifier: Apache-2.0
"""The generated blocks about finetuning, and the README's table."""

from __future__ import annotations

import statistics

import selection_tables
from optimizer_tables import H100_STEPS, step
from rows import (
    H100,
    Row,
    figure,
    find,
    generated,
    gib,
    gpu_name,
    model_name,
    one,
    rows,
    source,
    table,
    times,
)

# The newest build whose float32, tf32 and bf16 passes were all run beside the published loop.
BY_PRECISION = {"commit": "0dfcfdf", "device": H100}
PASSES = {
    "published, float32": "published",
    "float32": "hullkit",
    "tf32": "hullkit, tf32",
    "bf16": "hullkit, bf16",
    'bf16, `snapshot="host"`': "hullkit, bf16, host snapshot",
    "float32, eager": "hullkit eager",
}


def _query(model: str, tokens: str, provider: str) -> Row:
    shape = f"{model} tokens={tokens} updates=50 gradients=30"
    return one("gpu", op="finetune", provider=provider, shape=shape, **BY_PRECISION)


def _shape(row: Row) -> tuple[str, str]:
    """The model's name on the pages, and the tokens of a text."""
    model, _, facts = row["shape"].partition(" tokens=")
    return model_name(model), facts.split()[0]


def _ms(row: Row) -> str:
    return f"{float(row['p50']):.0f}"


def _ratio(published: Row, ours: Row) -> str:
    return times(float(published["p50"]) / float(ours["p50"]))


def _finetuned(model: str, lengths: tuple[str, ...], providers: dict[str, str]) -> str:
    lines = []
    for name, provider in providers.items():
        cells: list[str] = []
        for tokens in lengths:
            row, published = (_query(model, tokens, p) for p in (provider, "published"))
            apart = "" if row is published else _ratio(published, row)
            cells += [_ms(row), row["rounds"], apart, row["peak_mb"]]
        lines.append([name, *cells])
    header = [f"{model_name(model)}, passes"]
    for tokens in lengths:
        header += [f"{tokens} tokens, ms", "rounds", "times published", "peak MB"]
    return table(header, lines) + "\n\n" + source(_query(model, lengths[0], "published"))


@generated
def finetune_gpt2() -> str:
    return _finetuned("GPT-2 small", ("400", "1024"), PASSES)


@generated
def finetune_smollm2() -> str:
    providers = {name: PASSES[name] for name in ("published, float32", "float32", "bf16")}
    return _finetuned("smollm2-135m", ("400",), providers)


def _beside_published(provider: str) -> list[tuple[Row, Row]]:
    """The published loop's row and hullkit's of the same run, the newest first."""
    found = []
    for row in reversed(find("gpu", op="finetune", provider="published")):
        wanted = {key: row[key] for key in ("shape", "commit", "device")}
        ours = find("gpu", op="finetune", provider=provider, **wanted)
        found += [(row, own) for own in ours]
    return found


def _newest(model: str, tokens: str, provider: str) -> tuple[Row, Row]:
    """The newest such pair of more than one round."""
    return next(
        pair
        for pair in _beside_published(provider)
        if _shape(pair[0]) == (model, tokens) and int(pair[0]["rounds"]) > 1
    )


def _pair_cells(published: Row, ours: Row) -> list[str]:
    cells = [cell for row in (published, ours) for cell in (_ms(row), row["rounds"])]
    return [*cells, _ratio(published, ours)]


PAIR = ["published, float32, ms", "rounds", "hullkit, ms", "rounds", "times published"]


@generated
def finetune_newest() -> str:
    lines = []
    for model, tokens in (("GPT-2 124M", "400"), ("GPT-2 124M", "1024"), ("SmolLM2-135M", "400")):
        for passes, provider in (("bf16", "hullkit, bf16"), ("float32", "hullkit")):
            pair = _newest(model, tokens, provider)
            device = gpu_name(pair[0])
            lines.append([model, tokens, passes, device, pair[0]["commit"], *_pair_cells(*pair)])
    header = ["model", "tokens", "hullkit's passes", "device", "commit", *PAIR]
    told = f"Devices and commits as in the table, torch {pair[0]['torch']}, `{pair[0]['command']}`."
    return table(header, lines, 5) + f"\n\n{told}"


@generated
def finetune_published_runs() -> str:
    lines = []
    for published, ours in _beside_published("hullkit, bf16"):
        device = gpu_name(published).removeprefix("NVIDIA ")
        cells = _pair_cells(published, ours)
        lines.append([*_shape(published), device, published["commit"], *cells])
    return table(["model", "tokens", "device", "commit", *PAIR], lines, 4)


@generated
def finetune_cpu() -> str:
    """Runs, the newest first; a run's rows lie behind its published one."""
    runs: list[list[Row]] = []
    for row in find("cpu", op="finetune"):
        if row["provider"] == "published":
            runs.append([])
        runs[-1].append(row)
    lines = []
    for run in reversed(runs):
        for row in run:
            ours = row is not run[0]
            name = CPU_PASSES[row["provider"]]
            seconds = figure(float(row["p50"]) / 1000)
            cells = [seconds, row["rounds"], _ratio(run[0], row) if ours else ""]
            lines.append([*_shape(row), name, row["commit"], *cells])
    header = ["model", "tokens", "passes", "commit", "s a query", "rounds", "times published"]
    of_first = source(find("cpu", op="finetune")[0], several=True)
    return table(header, lines, 4) + "\n\n" + of_first


CPU_PASSES = {
    "published": "published, float32",
    "hullkit eager": "float32",
    "hullkit, bf16": "bf16",
    "hullkit, bf16 compiled": "bf16, compiled",
}


@generated
def finetune_quality() -> str:
    lines = []
    for subset, name in (("python", "Python"), ("sotu", "speeches")):
        shape = f"{subset} smollm2-135m queries=20 updates=20"
        cells = []
        for provider in ("unadapted", "published", "hullkit", "hullkit, bf16"):
            row = one("gpu", op="bits per byte", provider=provider, shape=shape, **BY_PRECISION)
            cells.append(f"{float(row['p50']):.5f}")
        lines.append([name, *cells])
    header = ["mean bits per byte", "unadapted", "published", "float32", "bf16"]
    row = find("gpu", op="bits per byte", **BY_PRECISION)[0]
    return table(header, lines) + "\n\n" + source(row)


@generated
def half_precision() -> str:
    latest = rows("half_precision")[-1]
    run = {"commit": latest["commit"]}
    base = {
        (row["subset"], row["query"]): float(row["base_bpb"])
        for row in find("half_precision", weights="float32", **run)
    }
    lines = []
    for rule, name in (("knn 20", "kNN, 20 updates"), ("hull 40, at most 2", "hull, 40 updates")):
        for rate in ("5e-05", "0.0001"):
            cells = []
            for weights in ("float32", "bfloat16", "float16"):
                found = find("half_precision", rule=rule, lr=rate, weights=weights, **run)
                shares = [
                    100 * float(row["bpb"]) / base[row["subset"], row["query"]] for row in found
                ]
                cells.append(f"{statistics.mean(shares):.2f}")
            lines.append([name, rate, *cells])
    header = ["selection", "lr", "float32", "bfloat16", "float16"]
    return table(header, lines, 2) + "\n\n" + source(latest)


@generated
def long_texts() -> str:
    lines = []
    found = find("gpu", op="finetune a long text")
    last = {row["shape"].partition(" tokens=")[0]: row["commit"] for row in found}
    for row in found:
        model, _, sizes = row["shape"].partition(" tokens=")
        if row["commit"] != last[model]:
            continue
        activations = row["provider"].split(", ")[1]
        cells = [f"{float(row['p50']):.0f}", gib(row["peak_mb"])]
        lines.append([model, row["dtype"], row["commit"], sizes.split()[0], activations, *cells])
    header = ["model", "weights", "commit", "tokens", "activations"]
    header += ["ms, one pass and two updates", "GiB"]
    return table(header, lines, 3) + "\n\n" + source(found[-1], several=True)


@generated
def embeddings() -> str:
    lines = []
    for row in rows("embeddings"):
        score = f"{float(row['% of base']):.1f} ± {float(row['s.e.']):.1f}"
        lines.append([row["embedding"], row["lr"], row["updates"], row["queries"], score])
    header = ["embedding", "lr", "updates", "queries", "BPB, % of base ± s.e."]
    first = rows("embeddings")[0]
    where = f"{first['device']}, torch {first['torch']}, {first['date']}, `{first['command']}`."
    return table(header, lines) + "\n\n" + where


def _on_gpu(name: str, rival: Row, how: str, ours: Row, passes: str, page: str) -> list[str]:
    """A line of the README's table: the rival's time and how it was made, ours, their ratio."""
    cells = [f"{figure(float(rival['p50']))} ms ({how})", f"{figure(float(ours['p50']))} ms"]
    cells[1] += f" ({passes})" if passes else ""
    link = f"[{gpu_name(ours)}](docs/results/{page}.md)"
    return [name, *cells, _ratio(rival, ours), link]


def _on_cpu(name: str, rival: Row, how: str, ours: Row, passes: str, page: str) -> list[str]:
    """Ratios alone: a row of a CPU does not say which processor it was exactly."""
    threads = {"1": "one thread", "2": "two threads"}[ours["threads"]]
    where = ", ".join(filter(None, ["CPU", ours["simd"], threads]))
    return [name, how, passes, _ratio(rival, ours), f"[{where}](docs/results/{page}.md)"]


@generated
def headline() -> str:
    gpu = {"dtype": "float32", **selection_tables.GPU}
    near = "neighbours n=200 d=384 total=50"
    naive, ours, _ = selection_tables._runs("select", near)[-1]
    batch = {"shape": "clustered B=512 n=200 d=1024 total=50", **gpu}
    sift = [
        one("cpu", op="sift", provider=provider, shape=near, commit="538ee16")
        for provider in ("activeft", "hullkit")
    ]
    knn = [
        find("cpu", op="knn", provider=name, shape="n=200 d=384 k=50", **selection_tables.CPU)[0]
        for name in ("torch", "hullkit")
    ]
    lines = [
        _on_gpu(
            "`select`, 512 prompts at once",
            one("gpu", op="frank_wolfe", provider="naive batched torch", **batch),
            "eager torch",
            one("gpu", op="select", provider="hullkit", **batch),
            "",
            "selection_gpu",
        ),
        _on_gpu(*_query_line("GPT-2 124M", "400", "hullkit, bf16")),
        _on_gpu(*_query_line("SmolLM2-135M", "400", "hullkit, bf16")),
        _on_gpu(*_query_line("GPT-2 124M", "1024", "hullkit")),
        _many_prompts(),
        _four_updates(),
        _on_cpu(
            "`select`, one prompt, 200 candidates",
            naive,
            "NumPy oracle, float64",
            ours,
            "float32",
            "selection_cpu",
        ),
        _on_cpu("`sift`, one prompt", sift[0], "activeft", sift[1], "float32", "selection_cpu"),
        _on_cpu("`knn`, one small pool", knn[0], "torch", knn[1], "float32", "selection_cpu"),
        _on_cpu("finetune the demo's model", *_cpu_query()),
    ]
    return table(["what", "before", "hullkit", "ratio", "measured on"], lines)


def _query_line(model: str, tokens: str, provider: str) -> tuple[str, Row, str, Row, str, str]:
    published, ours = _newest(model, tokens, provider)
    padded = "" if tokens == "1024" else ", padded to 1024 tokens"
    passes = {"hullkit": "float32", "hullkit, bf16": "bf16"}[provider]
    name = f"finetune {model}, 50 updates of {tokens} tokens"
    return name, published, f"published loop, float32{padded}", ours, passes, "finetuning"


def _cpu_query() -> tuple[Row, str, Row, str, str]:
    """The newest run of the small model: float32 passes beside the published loop."""
    found = find("cpu", op="finetune", shape="pybytes tokens=256 updates=50 gradients=30")
    run = {row["provider"]: row for row in found if row["commit"] == found[-1]["commit"]}
    ours = "hullkit eager"
    how = "published loop, float32"
    return run["published"], how, run[ours], CPU_PASSES[ours], "finetuning"


def _many_prompts() -> list[str]:
    """A prompt's share of a pass of 64, beside one at a time by PEFT alone."""
    shape = "SmolLM2-135M slots={} tokens=400 updates=50 gradients=30"
    alone, graphs = (
        find("gpu", op="many prompts", provider=name, shape=shape.format(1))[-1]
        for name in ("PEFT, LoRA r=16", "PEFT, LoRA r=16, CUDA graphs")
    )
    ours = one(
        "gpu", op="many prompts", provider="PromptBatch r=16", shape=shape.format(64),
        commit=alone["commit"],
    )  # fmt: skip
    each, captured, shared = (1e3 / float(row["p50"]) for row in (alone, graphs, ours))
    before = f"{figure(each)} ms (PEFT), {figure(captured)} ms (in CUDA graphs)"
    ratio = f"{times(each / shared)}, {times(captured / shared)}"
    name = "LoRA of SmolLM2-135M, 64 prompts at once, for each 50 updates"
    page = f"[{gpu_name(ours)}](docs/results/many_prompts.md)"
    return [name, before, f"{figure(shared)} ms", ratio, page]


def _four_updates() -> list[str]:
    ours, torch = (step(H100_STEPS, name) for name in ("hullkit Adam k=4", "torch fused Adam"))
    name = "`Adam`, four updates with one gradient"
    line = _on_gpu(name, torch, "torch, fused", ours, "", "optimizers")
    ratio = times(4 * float(torch["p50"]) / float(ours["p50"]))
    return [name, f"4 x {line[1]}", line[2], ratio, line[4]]
