# SPDX-License-Identifier: Apache-2.0
"""The generated blocks about finetuning, and the README's table."""

from __future__ import annotations

import statistics

import selection_tables
from optimizer_tables import H100_STEPS, step
from rows import H100, Row, figure, find, generated, gib, gpu_name, one, rows, source, table, times

LATEST = {"commit": "0dfcfdf", "device": H100}
PASSES = {
    "published": "published",
    "float32": "hullkit",
    "tf32": "hullkit, tf32",
    "bf16": "hullkit, bf16",
    'bf16, `snapshot="host"`': "hullkit, bf16, host snapshot",
    "float32, eager": "hullkit eager",
}


def _query(model: str, tokens: str, provider: str) -> Row:
    shape = f"{model} tokens={tokens} updates=50 gradients=30"
    return one("gpu", op="finetune", provider=provider, shape=shape, **LATEST)


def _finetuned(model: str, lengths: tuple[str, ...], providers: dict[str, str]) -> str:
    lines = []
    for name, provider in providers.items():
        cells: list[str] = []
        for tokens in lengths:
            row, published = (_query(model, tokens, p) for p in (provider, "published"))
            ratio = float(published["p50"]) / float(row["p50"])
            apart = "" if row is published else times(ratio)
            cells += [f"{float(row['p50']):.0f}", apart, row["peak_mb"]]
        lines.append([name, *cells])
    header = [f"{model}, passes"]
    for tokens in lengths:
        header += [f"{tokens} tokens, ms", "times published", "peak MB"]
    return table(header, lines) + "\n\n" + source(_query(model, lengths[0], "published"))


@generated
def finetune_gpt2() -> str:
    return _finetuned("GPT-2 small", ("400", "1024"), PASSES)


@generated
def finetune_smollm2() -> str:
    providers = {name: PASSES[name] for name in ("published", "float32", "bf16")}
    return _finetuned("smollm2-135m", ("400",), providers)


@generated
def finetune_published_runs() -> str:
    lines = []
    for row in find("gpu", op="finetune", provider="published"):
        wanted = {"shape": row["shape"], "commit": row["commit"], "provider": "hullkit, bf16"}
        ours = one("gpu", op="finetune", **wanted)
        ratio = float(row["p50"]) / float(ours["p50"])
        cells = [f"{float(r['p50']):.0f}" for r in (row, ours)]
        device = gpu_name(row).removeprefix("NVIDIA ")
        lines.append([row["shape"], device, row["commit"], *cells, times(ratio)])
    return table(["one query, ms", "device", "commit", "published", "bf16", "ratio"], lines, 3)


@generated
def finetune_cpu() -> str:
    lines = []
    published = 0.0
    for row in find("cpu", op="finetune"):
        model, tokens, *_ = row["shape"].split()
        if row["provider"] == "published":
            published = float(row["p50"])
        name = row["provider"].removeprefix("hullkit").removeprefix(",").strip()
        ratio = "" if row["provider"] == "published" else times(published / float(row["p50"]))
        cells = [figure(float(row["p50"]) / 1000), ratio]
        lines.append([model, tokens, name, row["commit"], *cells])
    header = ["model", "example", "passes", "commit", "s a query", "times published"]
    of_first = source(find("cpu", op="finetune")[0], several=True)
    return table(header, lines, 4) + "\n\n" + of_first


@generated
def finetune_quality() -> str:
    lines = []
    for subset, name in (("python", "Python"), ("sotu", "speeches")):
        shape = f"{subset} smollm2-135m queries=20 updates=20"
        cells = []
        for provider in ("unadapted", "published", "hullkit", "hullkit, bf16"):
            row = one("gpu", op="bits per byte", provider=provider, shape=shape, **LATEST)
            cells.append(f"{float(row['p50']):.5f}")
        lines.append([name, *cells])
    header = ["mean bits per byte", "unadapted", "published", "float32", "bf16"]
    row = find("gpu", op="bits per byte", **LATEST)[0]
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


def _measured(name: str, rival: Row | tuple[Row, str], ours: Row, page: str) -> list[str]:
    """A line of the README's table."""
    row, what = rival if isinstance(rival, tuple) else (rival, rival["provider"])
    values = float(row["p50"]), float(ours["p50"])
    slow = max(values) > 10_000
    unit, scale = ("s", 1000) if slow else ("ms", 1)
    cells = [f"{figure(value / scale)} {unit}" for value in values]
    ratio = times(values[0] / values[1])
    link = f"[{gpu_name(ours)}](docs/results/{page}.md)"
    return [name, f"{cells[0]} ({what})", cells[1], ratio, link]


@generated
def headline() -> str:
    gpu = {"dtype": "float32", **selection_tables.GPU}
    near = "neighbours n=200 d=384 total=50"
    naive, ours, _ = selection_tables._runs("select", near)[-1]
    batch = {"shape": "clustered B=512 n=200 d=1024 total=50", **gpu}
    lines = [
        _measured("`select`, one prompt, 200 candidates", (naive, "NumPy"), ours, "selection_cpu"),
        _measured(
            "`select`, 512 prompts at once",
            (one("gpu", op="frank_wolfe", provider="naive batched torch", **batch), "eager torch"),
            one("gpu", op="select", provider="hullkit", **batch),
            "selection_gpu",
        ),
        _measured(
            "`sift`, one prompt",
            *(
                one("cpu", op="sift", provider=provider, shape=near, commit="538ee16")
                for provider in ("activeft", "hullkit")
            ),
            "selection_cpu",
        ),
        _measured(
            "`knn`, one small pool",
            find("cpu", op="knn", provider="torch", shape="n=200 d=384 k=50", **SMALL)[0],
            find("cpu", op="knn", provider="hullkit", shape="n=200 d=384 k=50", **SMALL)[0],
            "selection_cpu",
        ),
        *(
            _measured(
                f"finetune {name}, 400 tokens, 50 updates, bf16",
                (
                    _newest(model, commit, "published"),
                    "published loop, padded to 1024 tokens",
                ),
                _newest(model, commit, "hullkit, bf16"),
                "finetuning",
            )
            for name, model, commit in (
                ("GPT-2 small", "GPT-2 small", "2ba5f2f"),
                ("SmolLM2-135M", "smollm2", "dfc045a"),
            )
        ),
        _measured(
            "finetune SmolLM2-135M on a CPU, bf16",
            (_on_cpu("published"), "published loop"),
            _on_cpu("hullkit, bf16"),
            "finetuning",
        ),
        _four_updates(),
    ]
    return table(["what", "before", "hullkit", "ratio", "measured on"], lines)


def _newest(model: str, commit: str, provider: str) -> Row:
    shape = f"{model} tokens=400 updates=50 gradients=30"
    return one("gpu", op="finetune", provider=provider, shape=shape, commit=commit)


SMALL = selection_tables.CPU


def _on_cpu(provider: str) -> Row:
    shape = "smollm2-135m tokens=256 updates=50 gradients=30"
    return one("cpu", op="finetune", provider=provider, shape=shape)


def _four_updates() -> list[str]:
    names = ("hullkit Adam k=4", "torch fused Adam")
    ours, torch = (step(H100_STEPS, name) for name in names)
    four = {**torch, "p50": str(4 * float(torch["p50"]))}
    return _measured(
        "`Adam`, four updates with one gradient", (four, "torch, fused"), ours, "optimizers"
    )
