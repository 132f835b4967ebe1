"""The generated blocks about finetuning and optimizers, and the README's table."""

from __future__ import annotations

import statistics

import selection_tables
from rows import H100, Row, figure, find, generated, gib, one, rows, source, table, times

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
        lines.append([row["shape"], row["commit"], *cells, times(ratio)])
    return table(["one query, ms", "commit", "published", "bf16", "ratio"], lines, 2)


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
    return table(header, lines, 4) + "\n\n" + source(find("cpu", op="finetune")[0])


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


MODEL = "GPT-2 small, 148 tensors, 124439808 parameters"


def _step(name: str, provider: str) -> Row:
    """Of several runs the first."""
    return find(name, op="optimizer step", provider=provider, shape=MODEL)[0]


@generated
def optimizers() -> str:
    lines = []
    gpu, cpu = (float(_step(name, "torch fused Adam")["p50"]) for name in ("gpu", "cpu"))
    copy = float(_step("gpu", "copy of 7 words")["p50"])
    for k in (1, 2, 4, 8):
        ours = [float(_step(name, f"hullkit Adam k={k}")["p50"]) for name in ("gpu", "cpu")]
        cells = [figure(ours[0]), figure(ours[0] / copy), times(k * gpu / ours[0])]
        lines.append([f"k = {k}", *cells, figure(ours[1]), times(k * cpu / ours[1])])
    header = ["k updates, one gradient", "H200, ms", "copies", "k by torch's fused Adam"]
    header += ["CPU, ms", "k by torch's fused Adam"]
    sources = [source(_step(name, "hullkit Adam k=1")) for name in ("gpu", "cpu")]
    return table(header, lines) + "\n\n" + "\n".join(sources)


@generated
def optimizers_others() -> str:
    lines = []
    for name, provider in (
        ("`torch._foreach_add_`", "torch _foreach_add_"),
        ("`accumulate_`, float32 gradients", "hullkit accumulate_ float32"),
        ("`accumulate_`, bfloat16 gradients", "hullkit accumulate_ bfloat16"),
        ("torch's SGD with momentum, one update", "torch SGD, momentum"),
        ("`SGD` with momentum, four updates", "hullkit SGD k=4, momentum"),
        ("`Adam`, two updates, gradient clipped", "hullkit Adam k=2, clipped"),
    ):
        cells = [figure(float(_step(where, provider)["p50"])) for where in ("gpu", "cpu")]
        lines.append([name, *cells])
    return table(["call", "H200, ms", "CPU, ms"], lines)


@generated
def optimizers_host() -> str:
    lines = []
    for provider in ("torch fused Adam (host)", "hullkit Adam k=2 (host)"):
        found = find("gpu", op="optimizer step", provider=provider, shape=MODEL)
        lines.append([provider, *(figure(1000 * float(row["p50"])) for row in found)])
    runs = ["first run", "second run", "third run"]
    return table(["a step keeps the host busy, µs", *runs], lines)


@generated
def half_precision() -> str:
    base = {
        (row["subset"], row["query"]): float(row["base_bpb"])
        for row in find("half_precision", weights="float32")
    }
    lines = []
    for rule, name in (("knn 20", "kNN, 20 updates"), ("hull 40, at most 2", "hull, 40 updates")):
        for rate in ("5e-05", "0.0001"):
            cells = []
            for weights in ("float32", "bfloat16", "float16"):
                found = find("half_precision", rule=rule, lr=rate, weights=weights)
                shares = [
                    100 * float(row["bpb"]) / base[row["subset"], row["query"]] for row in found
                ]
                cells.append(f"{statistics.mean(shares):.2f}")
            lines.append([name, rate, *cells])
    header = ["selection", "lr", "float32", "bfloat16", "float16"]
    return table(header, lines, 2) + "\n\n" + source(rows("half_precision")[0])


SIZES = {
    "all weights, float32": ("all, bf16 passes", "float32"),
    "all weights, bfloat16": ("all, default passes", "bfloat16"),
    "LoRA": ("LoRA r=16, default passes", "bfloat16"),
}


def _sizes() -> tuple[dict[str, dict[str, list[str]]], str]:
    """By model and kind of weights the newest time and memory; and where it was measured.

    A model whose passes could not be captured says so.
    """
    cells: dict[str, dict[str, list[str]]] = {}
    commits: dict[str, str] = {}
    for row in find("gpu", op="finetune by size"):
        if "host snapshot" in row["provider"] or row["provider"].startswith("old"):
            continue
        model = row["shape"].partition(" parameters=")[0]
        for name, (kind, dtype) in SIZES.items():
            if f", {kind}," in row["provider"] and row["dtype"] == dtype:
                eager = " (eager)" if "eager" in row["provider"] else ""
                took = [f"{float(row['p50']):.0f}{eager}", gib(row["peak_mb"])]
                cells.setdefault(model, {})[name] = took
                commits[f"{model} {name}"] = row["commit"]
    newest = " and ".join(dict.fromkeys(commits.values()))
    row = {**find("gpu", op="finetune by size")[0], "commit": newest}
    order = sorted(cells, key=_parameters)
    return {model: cells[model] for model in order}, source(row)


def _size_table(cells: dict[str, dict[str, list[str]]]) -> str:
    header = ["model"]
    for name in SIZES:
        header += [f"{name}, ms", "GiB"]
    lines = []
    for model, kinds in cells.items():
        line = [model]
        for name in SIZES:
            line += kinds.get(name, ["", ""])
        lines.append(line)
    return table(header, lines)


@generated
def model_sizes() -> str:
    cells, where = _sizes()
    return _size_table(cells) + "\n\n" + where


@generated
def model_sizes_short() -> str:
    cells, _ = _sizes()
    short = {name: cells[name] for name in ("SmolLM2-135M", "Llama-3.2-1B", "Mistral-7B")}
    return _size_table(short)


def _parameters(model: str) -> int:
    shapes = (row["shape"].partition(" parameters=") for row in rows("gpu"))
    return next(int(rest.split()[0]) for name, _, rest in shapes if name == model and rest)


@generated
def first_queries() -> str:
    found = find("gpu", op="finetune by size, first query", commit="32edfec")
    lines = []
    for model in sorted(
        {row["shape"].partition(" parameters=")[0] for row in found}, key=_parameters
    ):
        line = [model]
        for kind, dtype in SIZES.values():
            seconds = [
                figure(float(row["p50"]))
                for row in found
                if row["shape"].startswith(f"{model} ")
                and f"hullkit, {kind}, device snapshot" in row["provider"]
                and row["dtype"] == dtype
            ]
            line.append(" to ".join(seconds))
        lines.append(line)
    return table(["model", *(f"{name}, s" for name in SIZES)], lines)


@generated
def model_sizes_old_new() -> str:
    lines = []
    for old in find("gpu", op="finetune by size", commit="1123a40"):
        wanted = {"provider": old["provider"].replace("old", "new"), "shape": old["shape"]}
        new = one("gpu", op="finetune by size", **wanted)
        what = old["provider"].split(", ")[1]
        model = old["shape"].partition(" parameters=")[0]
        cells = [f"{float(row['p50']):.0f}" for row in (old, new)]
        lines.append([model, what, old["dtype"], *cells])
    header = ["one run, ms a query", "trained", "weights", "commit 1123a40", "commit e2a61b4"]
    return table(header, lines, 3)


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
    device = ours["device"].removesuffix(" 80GB HBM3")
    link = f"[{device}](docs/results/{page}.md)"
    return [name, f"{cells[0]} ({what})", cells[1], ratio, link]


@generated
def headline() -> str:
    gpu = {"dtype": "float32", **selection_tables.GPU}
    near = "neighbours n=200 d=384 total=50"
    naive, ours, _ = selection_tables._run("select", near, **selection_tables.CPU)
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
            one("cpu", op="sift", provider="activeft", shape=near),
            one("cpu", op="sift", provider="hullkit", shape=near),
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
                f"finetune {name}, 50 updates, {passes}",
                (_query(model, "400", "published"), "published loop"),
                _query(model, "400", PASSES[passes]),
                "finetuning",
            )
            for name, model, passes in (
                ("GPT-2 small", "GPT-2 small", "float32"),
                ("GPT-2 small", "GPT-2 small", "bf16"),
                ("SmolLM2-135M", "smollm2-135m", "bf16"),
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


SMALL = selection_tables.CPU


def _on_cpu(provider: str) -> Row:
    shape = "smollm2-135m tokens=256 updates=50 gradients=30"
    return one("cpu", op="finetune", provider=provider, shape=shape)


def _four_updates() -> list[str]:
    ours, torch = (_step("gpu", name) for name in ("hullkit Adam k=4", "torch fused Adam"))
    four = {**torch, "p50": str(4 * float(torch["p50"]))}
    return _measured(
        "`Adam`, four updates with one gradient", (four, "torch, fused"), ours, "optimizers"
    )
