"""The generated blocks about architectures, and about what a captured pass is made of."""

from __future__ import annotations

from rows import find, generated, rows, source, table

# The kinds of fused functions, and the words by which a name belongs to one.
KINDS = {
    "linear": ("functional.linear", "addmm", "linear.forward"),
    "norm": ("norm",),
    "activation": ("silu", "gelu", "torch.mul"),
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
def architectures_eager() -> str:
    lines = [[row["architecture"], row["reason"]] for row in _latest() if row["reason"]]
    return table(["architecture", "why its passes are not captured"], lines, 2)
