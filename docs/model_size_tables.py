# SPDX-License-Identifier: Apache-2.0
"""The generated blocks about model sizes: time and memory of a query, by device and build."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rows import H100, Row, figure, find, generated, gib, gpu_name, source, table

SIZES = {
    "all weights, float32, bf16 passes": ("all, bf16 passes", "float32"),
    "all weights, bfloat16": ("all, default passes", "bfloat16"),
    "LoRA": ("LoRA r=16, default passes", "bfloat16"),
}
SIZES_RUN = {"commit": "c0127e0"}
FIRST = "finetune by size, first query"
MODELS = ["GPT-2 124M", "SmolLM2-135M", "Qwen2.5-0.5B", "Llama-3.2-1B", "Gemma-2-2B"]
MODELS += ["Llama-3.2-3B", "Phi-3-mini 3.8B", "Mistral-7B"]


def _size(
    model: str,
    name: str,
    op: str = "finetune by size",
    snapshot: str = "device",
) -> Row:
    """An empty row where nothing was measured."""
    kind, dtype = SIZES[name]
    start = f"hullkit, {kind}, {snapshot} snapshot, "
    found = [
        row
        for row in find("gpu", op=op, dtype=dtype, **SIZES_RUN)
        if row["provider"].startswith(start) and row["shape"].startswith(f"{model} parameters=")
    ]
    return found[0] if found else {}


def _size_cells(row: Row) -> list[str]:
    """Time and memory; a model whose passes could not be captured says so."""
    if not row:
        return ["", ""]
    if not row["p50"]:
        return ["out of memory", ""]
    eager = " (eager)" if ", eager: " in row["provider"] else ""
    return [f"{_ms(row)}{eager}", gib(row["peak_mb"])]


def _ms(row: Row) -> str:
    return f"{float(row['p50']):.0f}"


def _model_and_kind(row: Row) -> tuple[str, str]:
    """The model's name; what was trained and with which passes."""
    _, trained, passes, _ = row["provider"].split(", ", 3)
    return row["shape"].partition(" parameters=")[0], f"{trained}, {passes}"


def _pairs() -> list[tuple[Row, Row]]:
    """Rows of an old build, each with the new build's of the same run: the nearest in the file."""
    found = list(enumerate(find("gpu", op="finetune by size")))
    pairs = []
    for place, old in found:
        build, _, kind = old["provider"].partition(", ")
        if build == "old build":
            wanted = old | {"provider": f"new build, {kind}"}
            same = [
                (abs(at - place), new)
                for at, new in found
                if all(new[key] == wanted[key] for key in ("provider", "shape", "dtype", "device"))
            ]
            pairs.append((old, min(same, key=lambda item: item[0])[1]))
    return pairs


def _size_table(
    models: list[str],
    names: Sequence[str] = tuple(SIZES),
    first: str = "model",
    snapshot: str = "device",
) -> str:
    lines = []
    for model in models:
        line = [model]
        for name in names:
            line += _size_cells(_size(model, name, snapshot=snapshot))
        if any(line[1:]):
            lines.append(line)
    return table(_size_header(first, names), lines)


def _size_header(first: str, names: Iterable[str]) -> list[str]:
    return [first, *(cell for name in names for cell in (f"{name}, ms", "GiB"))]


@generated
def model_sizes() -> str:
    return _size_table(MODELS) + "\n\n" + source(_size(MODELS[0], "LoRA"))


@generated
def model_sizes_latest() -> str:
    """Builds after the first table's: on each device the newest row of each model and kind."""
    return "\n\n".join(_latest(device) for device in (H100, "NVIDIA H200"))


def _newest(device: str) -> dict[tuple[str, ...], Row]:
    """The newest row of each model, dtype and what was trained; the newest of all is the last."""
    newest: dict[tuple[str, ...], Row] = {}
    for row in find("gpu", op="finetune by size", device=device):
        build, trained, _, snapshot, _ = row["provider"].split(", ", 4)
        if row["p50"] and snapshot == "device snapshot" and build != "old build":
            key = _model_and_kind(row)[0], row["dtype"], trained
            newest.pop(key, None)
            newest[key] = row
    return newest


def _latest(device: str) -> str:
    first = {_setting(row): row["p50"] for row in find("gpu", op=FIRST)}
    newest = _newest(device)
    newest = {k: row for k, row in newest.items() if row["commit"] != SIZES_RUN["commit"]}
    *_, last = newest.values()
    lines = []
    for (model, dtype, trained), row in newest.items():
        seconds = figure(float(first[_setting(row)]))
        lines.append([model, trained, dtype, row["commit"], *_size_cells(row), seconds])
    lines.sort(key=lambda cells: _place(*cells[:3]))
    header = ["model", "trained", "weights", "commit", "ms", "GiB", "first query, s"]
    return table(header, lines, 4) + "\n\n" + source(last, several=True)


def _place(model: str, trained: str, dtype: str) -> tuple[int, bool, bool]:
    return MODELS.index(model), trained != "all", dtype != "float32"


def _setting(row: Row) -> tuple[str, ...]:
    return tuple(row[key] for key in ("provider", "shape", "dtype", "commit", "device"))


def _complete(model: str) -> dict[str, Row]:
    """The rows of the newest build that timed all three kinds on one device, or, for a model of
    which no build did, the most of them; by the kinds' names."""
    builds: dict[tuple[str, str], dict[str, Row]] = {}
    kinds = {(kind.partition(", ")[0], dtype): name for name, (kind, dtype) in SIZES.items()}
    for row in find("gpu", op="finetune by size"):
        build, trained, _, snapshot, _ = row["provider"].split(", ", 4)
        name = kinds.get((trained, row["dtype"]))
        ours = build != "old build" and snapshot == "device snapshot" and row["p50"]
        if name is not None and ours and _model_and_kind(row)[0] == model:
            key = row["commit"], row["device"]
            found = builds.pop(key, {})  # the newest of all is the last
            builds[key] = found | {name: row}
    most = max(map(len, builds.values()))
    return [found for found in builds.values() if len(found) == most][-1]


@generated
def model_sizes_short() -> str:
    """One build and one device a line: what is compared was measured together."""
    lines = []
    for model in ("SmolLM2-135M", "Llama-3.2-1B", "Mistral-7B"):
        found = _complete(model)
        one = next(iter(found.values()))
        cells = [cell for name in SIZES for cell in _size_cells(found.get(name, {}))]
        lines.append([model, gpu_name(one).removeprefix("NVIDIA "), one["commit"], *cells])
    header = ["model", "GPU", "commit", *_size_header("model", SIZES)[1:]]
    return table(header, lines, 3)


@generated
def host_snapshots() -> str:
    names = ("all weights, float32, bf16 passes", "all weights, bfloat16")
    return _size_table(MODELS, names, "copy of the weights on the host", "host")


@generated
def first_queries() -> str:
    lines = []
    for model in MODELS:
        found = [_size(model, name, FIRST) for name in SIZES]
        lines.append([model, *(figure(float(row["p50"])) if row else "" for row in found)])
    return table(["model", *(f"{name}, s" for name in SIZES)], lines)


@generated
def model_sizes_old_new() -> str:
    lines = []
    for old, new in _pairs():
        model, kind = _model_and_kind(old)
        trained = kind.partition(", ")[0]
        device = gpu_name(old).removeprefix("NVIDIA ")
        builds = f"{old['commit']}, {new['commit']}"
        lines.append([model, trained, old["dtype"], device, builds, _ms(old), _ms(new)])
    header = ["in one run, ms a query", "trained", "weights", "device", "builds", "old", "new"]
    return table(header, lines, 5)
