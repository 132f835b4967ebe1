# SPDX-License-Identifier: Apache-2.0
"""The generated blocks about many prompts at once."""

from __future__ import annotations

from statistics import median

from rows import H100, Row, find, generated, gib, gpu_name, one, source, table, times

Times = dict[tuple[str, str], float]
TORCH = {"PEFT, LoRA r=16": "PEFT, LoRA r=16, one at a time"}  # without our kernels
TORCH["PEFT, LoRA r=16, CUDA graphs"] = "PEFT, LoRA r=16, CUDA graphs, one at a time"
OURS = {"TestTimeFinetuner, LoRA r=16": "LoRA r=16, one at a time"}
OURS["TestTimeFinetuner, all weights"] = "all weights, one at a time"
ALONE = TORCH | OURS


def _last_runs() -> list[Row]:
    """For each device and model, the rows of the last build that ran many prompts of it at once;
    the H100's are first."""
    found = [row for row in find("gpu", op="many prompts") if row["p50"]]
    together = [row for row in found if row["provider"] not in ALONE]
    last = {(row["device"], _model(row)): row["commit"] for row in together}
    kept = [row for row in found if row["commit"] == last.get((row["device"], _model(row)))]
    return sorted(kept, key=lambda row: row["device"] != H100)


def _model(row: Row) -> str:
    name, *facts = row["shape"].split()
    name += "".join(f", {fact}" for fact in facts if fact in ("scored", "generated"))
    return name if row["dtype"] == "bfloat16" else f"{name}, {row['dtype'].upper()} base"


@generated
def prompts_a_second() -> str:
    """Each model's rows, beside its own baselines of the same run."""
    lines = []
    baselines: dict[tuple[str, ...], float] = {}
    found = _last_runs()
    for row in found:
        model, slots = _model(row), row["shape"].split()[1]
        device, rate = gpu_name(row).removeprefix("NVIDIA "), float(row["p50"])
        provider = row["provider"]
        if provider in ALONE:
            baselines[device, model, provider] = rate
        name = ALONE.get(provider, f"PromptBatch, {slots.removeprefix('slots=')} slots")
        others = TORCH if provider in OURS else {} if provider in TORCH else ALONE
        own = [baselines.get((device, model, base)) if base in others else None for base in ALONE]
        ratios = ["" if base is None else times(rate / base) for base in own]
        cells = [f"{rate:.2f}", *ratios, gib(row["peak_mb"]), row["commit"]]
        lines.append([device, model, name, *cells])
    header = ["device", "model", "how", "prompts a second", "of PEFT", "of PEFT, CUDA graphs"]
    header += ["of LoRA alone", "of all weights alone", "GiB", "commit"]
    said = dict.fromkeys(source(row) for row in found)
    return table(header, lines, 3) + "\n\n" + "\n".join(said)


def _stream(figure: str) -> Row:
    """A figure of the last stream's run."""
    last = find("many_prompts", check="stream")[-1]
    run = {key: last[key] for key in ("model", "shape", "commit", "device")}
    return one("many_prompts", check="stream", figure=figure, **run)


@generated
def many_prompts_answers() -> str:
    """A long stream with bad queries: right answers, errors, memory."""
    lines = []
    shown = {
        "right answers": "answers of good queries",
        "errors that name theirs": "errors of bad queries",
    }
    for name, words in shown.items():
        row = _stream(name)
        lines.append([words, f"{row['value']} of {row['count']}"])
    row = _stream("largest difference from alone")
    lines.append([f"largest difference from alone, of {row['count']} queries", row["value"]])
    for name in ("device memory grown", "host memory grown"):
        mib = max(0.0, float(_stream(name)["value"])) / 2**20
        lines.append([f"{name} in the second half", f"{mib:.1f} MiB"])
    lines.append(["queries a second", _stream("queries a second")["value"]])
    slots, tokens, path = row["shape"].split()
    tokens = tokens.removeprefix("tokens=").replace("..", " to ")
    header = f"{_stream('device memory grown')['count']} queries, {row['model']}, {row['dtype']}, "
    header += f"{slots.removeprefix('slots=')} slots, texts of {tokens} tokens, {path}"
    return table([header, ""], lines) + "\n\n" + source(row)


BOUND = 1e-4  # of the benchmark, for a subset's mean


@generated
def many_prompts_texts() -> str:
    """Real texts: bits per byte unadapted, by PEFT alone, from one slot and among neighbours; and
    PEFT's adapter beside itself, begun with the next larger numbers."""
    found = find("many_prompts", check="texts")
    found = [row for row in found if row["commit"] == found[-1]["commit"]]
    subsets: dict[str, dict[str, Row]] = {}
    for row in found:
        subsets.setdefault(row["shape"].split()[0], {})[row["figure"]] = row
    scores = [name for name in next(iter(subsets.values())) if name.startswith("BPB, ")]
    differences = {
        "largest difference from one slot": "a query from one slot, at most",
        "largest difference from PEFT alone": "a query from PEFT, at most",
        "PEFT's largest difference from itself": "a query of PEFT from itself, at most",
        "mean from PEFT alone": "mean from PEFT",
        "PEFT's mean from itself": "PEFT's mean from itself",
    }
    same = "largest difference where PEFT gives the same again"
    lines = []
    for subset, rows in subsets.items():
        met = "met" if abs(float(rows["mean from PEFT alone"]["value"])) <= BOUND else "missed"
        cells = [rows[name]["value"] for name in (*scores, *differences)]
        repeated = rows.get(same, {"value": "none", "count": "0"})
        lines.append([subset, *cells, met, repeated["value"], repeated["count"]])
    facts = " ".join(found[-1]["shape"].split()[1:])
    header = [f"{found[0]['count']} queries each, {facts}"]
    header += [f"BPB, {name.removeprefix('BPB, ')}" for name in scores]
    header += [*differences.values(), f"bound of {BOUND:.0e} for the mean"]
    header += ["a query from PEFT where PEFT repeats itself, at most", "such queries"]
    return table(header, lines) + "\n\n" + source(found[-1])


def _shapes(op: str, first: str) -> tuple[list[Row], dict[str, dict[str, str]], Times]:
    """Rows of the last build, the facts in their shapes, and times by shape and provider."""
    found = find("gpu", op=op)
    found = [row for row in found if row["commit"] == found[-1]["commit"]]
    shapes = [row["shape"] for row in found if row["provider"] == first]
    facts = {s: dict(part.split("=") for part in s.split() if "=" in part) for s in shapes}
    facts = dict(sorted(facts.items(), key=lambda item: _numbers(item[1])))
    return found, facts, {(row["shape"], row["provider"]): float(row["p50"]) for row in found}


def _numbers(fact: dict[str, str]) -> tuple[int, ...]:
    return tuple(int(fact[name]) for name in ("K", "d", "r"))


@generated
def low_rank_layers() -> str:
    """What a low-rank part adds to the time of a linear layer, forward and backward."""
    found, facts, times = _shapes("low-rank layers", "fused layer")
    lines: dict[tuple[str, str], list[str]] = {}
    layers: dict[tuple[str, str], list[float]] = {}
    for shape, fact in facts.items():
        alone, own, torch = (
            1e3 * times[shape, provider]
            for provider in ("layer alone", "fused layer", "baddbmm layer")
        )
        ratio = f"{(torch - alone) / (own - alone):.1f}x" if own > alone else "free"
        place = fact["K"], fact["d"]
        layers.setdefault(place, []).append(alone)
        lines.setdefault(place, []).extend([f"{own - alone:.0f}", f"{torch - alone:.0f}", ratio])
    header = ["slots", "width", "layer alone: us", *_headers(facts, "adds")]
    rows = [[*key, f"{median(layers[key]):.0f}", *cells] for key, cells in lines.items()]
    return table(header, rows) + "\n\n" + source(found[0])


def _headers(facts: dict[str, dict[str, str]], unit: str) -> list[str]:
    """Three for each rank."""
    header = []
    for rank in dict.fromkeys(fact["r"] for fact in facts.values()):
        header += [
            f"rank {rank}: {unit}",
            f"`baddbmm`{'' if unit == 'us' else ' ' + unit}",
            "ratio",
        ]
    return header


@generated
def low_rank_products() -> str:
    """hullkit's products and torch's `baddbmm`, forward and backward, as CUDA graphs."""
    found, facts, times = _shapes("low-rank products", "fused")
    lines: dict[tuple[str, str], list[str]] = {}
    for shape, fact in facts.items():
        own, torch = times[shape, "fused"], times[shape, "baddbmm"]
        cells = [f"{1e3 * own:.0f}", f"{1e3 * torch:.0f}", f"{torch / own:.2f}x"]
        lines.setdefault((fact["K"], fact["d"]), []).extend(cells)
    header = ["slots", "width", *_headers(facts, "us")]
    return (
        table(header, [[*key, *cells] for key, cells in lines.items()]) + "\n\n" + source(found[0])
    )
