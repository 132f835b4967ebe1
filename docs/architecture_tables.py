# SPDX-License-Identifier: Apache-2.0
"""The generated blocks about architectures, and about what a captured pass is made of."""

from __future__ import annotations

from rows import find, generated, rows, source, table

# The kinds of fused functions, and the words by which a name belongs to one.
KINDS = {
    "linear": ("functional.linear", "addmm", "linear.forward"),
    "norm": ("norm",),
    "activation": ("silu", "gelu", "torch.mul"),
    "gated layer": ("mlp.forward",),
    "residual": ("torch.add",),
    "rotary": ("rotary",),
    "attention": ("attention",),
    "experts": ("experts",),
    "loss": ("loss",),
}


def _kinds(fused: str) -> list[str]:
    """The kinds of the functions that a pass replaced."""
    names = fused.split()
    # The package has its model's name, in which any word may occur.
    short = [".".join(name.split(".")[-2:]).lower() for name in names]
    return [k for k, words in KINDS.items() if any(w in name for w in words for name in short)]


def _latest() -> list[dict[str, str]]:
    commit = rows("architectures")[-1]["commit"]
    return find("architectures", commit=commit)


@generated
def architectures() -> str:
    lines = []
    for row in _latest():
        lines.append(
            [row["architecture"], row["path"], ", ".join(_kinds(row["fused"])), row["difference"]]
        )
    header = ["architecture", "passes", "fused", "difference"]
    return table(header, lines, 3) + "\n\n" + source(_latest()[0])


@generated
def architectures_counted() -> str:
    found = _latest()
    captured = sum(row["path"] == "captured" for row in found)
    worst = max(float(row["difference"]) for row in found)
    return (
        f"{captured} of {len(found)} architectures have captured passes; the others run eagerly. "
        f"The largest difference is {worst:.1e}; the tests allow {float(found[0]['bound']):.1e}."
    )


@generated
def pass_profile() -> str:
    """Kernels and microseconds of a pass by kind, of the latest commit that has such rows."""
    found = find("gpu", op="pass profile")
    found = [row for row in found if row["commit"] == found[-1]["commit"]]
    models = list(dict.fromkeys(_model(row) for row in found))
    kinds = list(dict.fromkeys(row["provider"].rpartition(", ")[2] for row in found))
    lines = []
    for kind in [*kinds, "all"]:
        cells = [kind]
        for model in models:
            own = [row for row in found if _model(row) == model]
            own = [r for r in own if kind in ("all", r["provider"].rpartition(", ")[2])]
            kernels = sum(float(row["shape"].rpartition("kernels=")[2]) for row in own)
            cells += [f"{kernels:.0f}", f"{sum(float(row['p50']) for row in own):.0f}"]
        lines.append(cells)
    header = ["kernels"]
    for model in models:
        header += [f"{model}: number", "microseconds"]
    return table(header, lines) + "\n\n" + source(found[0])


def _model(row: dict[str, str]) -> str:
    trained = row["provider"].split(", ")[1]
    return row["shape"].partition(" tokens=")[0] + ("" if trained == "all" else f", {trained}")


@generated
def recording() -> str:
    """Eager passes that recording costs, of the latest commit that has such rows."""
    found = find("gpu", op="recording")
    found = [row for row in found if row["commit"] == found[-1]["commit"]]
    lines: dict[str, list[str]] = {}
    for row in found:
        model, _, tokens = row["shape"].partition(" T=")
        first = " (first of all)" if row["provider"].endswith("first of all") else ""
        lines.setdefault(model, []).append(f"{tokens}{first}: {float(row['p50']):.1f}")
    cells = [[model, ", ".join(values)] for model, values in lines.items()]
    header = ["model", "tokens: recording costs so many eager passes"]
    return table(header, cells, 2) + "\n\n" + source(found[0])


@generated
def architectures_eager() -> str:
    lines = [[row["architecture"], row["reason"]] for row in _latest() if row["reason"]]
    return table(["architecture", "why its passes are not captured"], lines, 2)
