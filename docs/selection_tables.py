# SPDX-License-Identifier: Apache-2.0
"""The generated blocks about selection."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rows import H100, Row, figure, find, generated, mean, median, one, rows, source, table, times

CPU = {"commit": "c920fef", "simd": "avx512"}
GPU = {"commit": "c7f5848"}
PROBLEMS = {
    "random directions, d = 384": "gaussian n=200 d=384 total=50",
    "random directions, d = 1024": "gaussian n=200 d=1024 total=50",
    "like embeddings of text, d = 384": "neighbours n=200 d=384 total=50",
    "like embeddings of text, d = 1024": "neighbours n=200 d=1024 total=50",
}


def _runs(op: str, shape: str) -> list[tuple[Row, Row, Row | None]]:
    """Rows of NumPy, ours and torch by run; a run's rows lie next to each other."""
    found: list[tuple[Row, Row, Row | None]] = []
    naive: Row | None = None
    torch: Row | None = None
    for row in find("cpu", op=op, shape=shape):
        if row["provider"] == "numpy":
            naive, torch = row, None
        elif row["provider"] == "torch":
            torch = row
        elif row["provider"] == "hullkit":
            assert naive is not None
            found.append((naive, row, torch))
    return found


def _run(op: str, shape: str, **wanted: str) -> tuple[Row, Row, Row | None]:
    """The first such run."""
    return next(
        run for run in _runs(op, shape) if all(run[1][key] == v for key, v in wanted.items())
    )


@generated
def select_cpu() -> str:
    lines = []
    for name, shape in PROBLEMS.items():
        naive, ours, torch = _run("select", shape, **CPU)
        assert torch is not None
        ratio = float(naive["p50"]) / float(ours["p50"])
        cells = [figure(float(row["p50"])) for row in (naive, torch, ours)]
        lines.append([name, *cells, times(ratio)])
    header = ["`select`, ms a prompt", "NumPy", "eager torch", "hullkit", "against NumPy"]
    return table(header, lines) + "\n\n" + source(ours)


@generated
def select_cpu_runs() -> str:
    lines = []
    for name, shape in PROBLEMS.items():
        for naive, ours, _ in _runs("select", shape):
            values = float(naive["p50"]), float(ours["p50"])
            cells = [figure(value) for value in values]
            where = [ours["simd"], ours["commit"]]
            lines.append([name, *where, *cells, times(values[0] / values[1])])
    header = ["`select`, ms a prompt", "wide instructions", "commit"]
    return table([*header, "NumPy", "hullkit", "against NumPy"], lines, 3)


@generated
def select_cpu_batch() -> str:
    lines = []
    for dims in ("384", "1024"):
        shape = f"neighbours B=64 n=200 d={dims} total=50"
        single, double = (
            find("cpu", op="select", provider=f"hullkit {threads}", shape=shape, **CPU)[0]
            for threads in ("1 thread", "2 threads")
        )
        values = float(single["p50"]), float(double["p50"])
        lines.append([f"like text, d = {dims}", *map(figure, values), times(values[0] / values[1])])
    header = ["64 prompts, ms a call", "one thread", "two threads", "gain"]
    return table(header, lines)


@generated
def small_operations() -> str:
    lines = []
    for op, shape in (
        ("lmo", "n=200 d=384"),
        ("knn", "n=200 d=384 k=50"),
        ("apportion", "m=50 total=50"),
        ("lmo", "n=20000 d=384"),
        ("knn", "n=20000 d=384 k=50"),
    ):
        naive, ours, torch = _run(op, shape, **CPU)
        assert torch is not None
        cells = [figure(float(row["p50"])) for row in (naive, torch, ours)]
        lines.append([f"`{op}`", shape, *cells])
    return table(["call, ms", "shape", "NumPy", "torch", "hullkit"], lines, 2)


@generated
def sift_cpu() -> str:
    lines = []
    ran = {(row["shape"], row["commit"]) for row in find("cpu", op="sift", provider="activeft")}
    for name, shape in PROBLEMS.items():
        for commit, instructions in (("f024c71", "avx512"), ("538ee16", "avx2")):
            if (shape, commit) not in ran:
                continue
            run = {"op": "sift", "shape": shape, "commit": commit}
            assert find("cpu", provider="hullkit", **run)[0]["simd"] == instructions
            values = [median("cpu", provider=p, **run) for p in ("numpy", "activeft", "hullkit")]
            cells = [*map(figure, values), times(values[1] / values[2])]
            lines.append([name, instructions, commit, *cells])
    header = ["`sift`, ms a prompt", "wide instructions", "commit"]
    header += ["NumPy", "activeft", "hullkit", "against activeft"]
    first = find("cpu", op="sift", provider="hullkit")[0] | {"simd": ""}
    return table(header, lines, 3) + "\n\n" + source(first, several=True)


@generated
def interop_cpu() -> str:
    lines = []
    for name, shape in PROBLEMS.items():
        values = [
            median("cpu", op="interop.hullft", provider=provider, shape=shape)
            for provider in ("numpy", "hullkit")
        ]
        lines.append([name, *map(figure, values), times(values[0] / values[1])])
    header = ["through `hullkit.interop.hullft`, ms a prompt", "naive NumPy", "hullkit", "ratio"]
    row = find("cpu", op="interop.hullft", provider="hullkit")[0]
    return table(header, lines) + "\n\n" + source(row)


@generated
def interop_activeft() -> str:
    found = {row["provider"]: row for row in find("cpu", op="interop.activeft")}
    ours, theirs = (float(found[name]["p50"]) for name in ("hullkit", "activeft"))
    header = ["`Retriever`, ms a prompt", "activeft", "hullkit", "ratio"]
    shape = found["hullkit"]["shape"]
    body = table(header, [[shape, figure(theirs), figure(ours), times(theirs / ours)]])
    return body + "\n\n" + source(found["hullkit"])


def _clustered(op: str, provider: str, batch: str, dtype: str = "float32") -> str:
    shape = f"clustered B={batch} n=200 d=1024 total=50"
    found = find("gpu", op=op, provider=provider, shape=shape, dtype=dtype, **GPU)
    return found[0]["p50"] if found else ""


@generated
def select_gpu() -> str:
    lines = []
    for batch in ("1", "64", "512", "2048"):
        naive = _clustered("frank_wolfe", "naive batched torch", batch)
        ours = _clustered("select", "hullkit", batch)
        half = _clustered("select", "hullkit", batch, "bfloat16")
        ratio = times(float(naive) / float(ours)) if naive else ""
        cells = [figure(float(naive)) if naive else "", figure(float(ours)), ratio]
        lines.append([batch, *cells, figure(float(half))])
    header = ["prompts at once, ms a call", "naive", "float32", "against naive", "bfloat16"]
    row = find("gpu", op="select", provider="hullkit", device=H100, **GPU)[0]
    return table(header, lines) + "\n\n" + source(row)


@generated
def select_gpu_runs() -> str:
    lines = []
    for batch in ("1", "512"):
        shape = f"clustered B={batch} n=200 d=1024 total=50"
        for naive in find("gpu", op="frank_wolfe", provider="naive batched torch", shape=shape):
            wanted = {"shape": shape, "dtype": "float32", "commit": naive["commit"]}
            values = float(naive["p50"]), median("gpu", op="select", provider="hullkit", **wanted)
            cells = [figure(value) for value in values]
            lines.append([batch, naive["commit"], *cells, times(values[0] / values[1])])
    header = ["prompts at once, ms a call", "commit", "naive", "float32", "against naive"]
    return table(header, lines, 2)


@generated
def corpus_gpu() -> str:
    lines = []
    for op, batch in (("lmo", "1"), ("lmo", "16"), ("select", "16")):
        shape = f"M=1000000 d=384 B={batch}" + (" total=50" if op == "select" else "")
        cells = []
        for dtype in ("float32", "bfloat16"):
            ours = median("gpu", op=op, provider="hullkit", shape=shape, dtype=dtype, **GPU)
            copy = median("gpu", op="copy", shape="M=1000000 d=384", dtype=dtype, **GPU)
            cells += [figure(ours), figure(ours / copy)]
        lines.append([f"`{op}`", batch, *cells])
    header = ["a million rows, d = 384", "prompts", "float32, ms", "times a copy"]
    return table([*header, "bfloat16, ms", "times a copy"], lines)


@generated
def sift_gpu() -> str:
    lines = []
    for batch in ("1", "64", "512"):
        cells = [
            _clustered("sift", "naive batched torch", batch),
            _clustered("sift", "activeft", batch),
            _clustered("sift", "hullkit", batch),
            _clustered("sift", "hullkit", batch, "bfloat16"),
        ]
        lines.append([batch, *(figure(float(cell)) if cell else "" for cell in cells)])
    header = ["prompts at once, ms a call", "naive, batched", "activeft", "float32", "bfloat16"]
    return table(header, lines)


TEXTS = {"python": "Python", "kernel_docs": "kernel docs", "sotu": "speeches"}
DEBIAN = {**TEXTS, "deb_control": "package descriptions"}


@generated
def variants() -> str:
    lines = []
    for subset, name in DEBIAN.items():
        common = {"subset": subset, "commit": "7b27c9a"}
        for variant in ("vanilla", "away", "pairwise", "fully_corrective"):
            row = one("variants", method=variant, **common)
            cells = [figure(float(row["iterations"])), f"{float(row['dual_gap']):.1e}"]
            cells += [f"{float(row[key]):.5f}" for key in ("hull_residual", "residual")]
            lines.append([name, f"`{variant}`", *cells, figure(float(row["ms_alone"]))])
    header = ["corpus", "variant", "iterations", "dual gap", "residual of the weights"]
    row = one("variants", subset="python", method="vanilla", commit="7b27c9a")
    return (
        table([*header, "residual after rounding", "ms a prompt"], lines, 2) + "\n\n" + source(row)
    )


@generated
def variants_rules() -> str:
    names = {
        "vanilla": "hull",
        "capped at 2": "hull, at most two",
        "knn": "kNN",
        "knn capped at 2": "kNN, two updates each",
        "sift": "SIFT",
    }
    lines = []
    for subset, corpus in DEBIAN.items():
        common = {"subset": subset, "commit": "7b27c9a"}
        hull = float(one("variants", method="vanilla", **common)["residual"])
        for method, name in names.items():
            row = one("variants", method=method, **common)
            more = 100 * (float(row["residual"]) / hull - 1)
            cells = [f"{float(row[key]):.1f}" for key in ("distinct", "passes")]
            lines.append([corpus, name, *cells, f"{float(row['residual']):.3f}", f"{more:+.1f} %"])
    header = ["corpus", "50 updates by", "examples", "passes", "residual", "against the hull"]
    return table(header, lines, 2)


RULES = {
    "kNN": ("knn", ""),
    "kNN, two updates each": ("knn", "2"),
    "SIFT": ("sift", ""),
    "SIFT, at most two": ("sift", "2"),
    "hull": ("hull", ""),
    "hull, at most two": ("hull", "2"),
}
TOTALS = ("10", "20", "30", "50")


def _scores(rule: str, total: str, subset: str) -> list[Row]:
    method, cap = RULES[rule]
    wanted = {"method": method, "cap": cap, "total": total}
    found = find("selection_quality", **wanted, **({} if subset == "all" else {"subset": subset}))
    return sorted(found, key=lambda row: (row["subset"], int(row["query"])))


def _shares(found: Sequence[Row]) -> np.ndarray:
    return np.array([100 * float(row["bpb"]) / float(row["base_bpb"]) for row in found])


@generated
def selection_quality() -> str:
    lines = []
    for rule in RULES:
        for total in TOTALS:
            if not _scores(rule, total, "all"):
                continue
            cells = [f"{mean(_scores(rule, total, 'all'), 'passes'):.1f}"]
            cells += [f"{_shares(_scores(rule, total, s)).mean():.2f}" for s in (*TEXTS, "all")]
            lines.append([rule, total, *cells])
    header = ["selection", "updates", "passes", *TEXTS.values(), "all"]
    return table(header, lines, 1) + "\n\n" + source(rows("selection_quality")[0])


def _at_passes(rule: str, subset: str, wanted: float) -> np.ndarray:
    """Each query's share where the rule's mean passes are `wanted`, linear between its totals."""
    found = [_scores(rule, total, subset) for total in ("5", *TOTALS)]
    found = [scores for scores in found if scores]
    means = [mean(scores, "passes") for scores in found]
    if not min(means) - 0.5 <= wanted <= max(means) + 0.5:
        raise LookupError(f"{rule}: {wanted} passes lie outside {min(means)} to {max(means)}")
    weights = np.array([np.interp(wanted, means, unit) for unit in np.eye(len(means))])
    shares: np.ndarray = weights @ np.stack([_shares(scores) for scores in found])
    return shares


def _apart(rule: str, total: str, other: str, subset: str) -> str:
    found = _scores(rule, total, subset)
    apart = _shares(found) - _at_passes(other, subset, mean(found, "passes"))
    return f"{apart.mean():+.1f} ± {apart.std(ddof=1) / len(apart) ** 0.5:.1f}"


@generated
def selection_quality_apart() -> str:
    lines = []
    for rule, total in (("hull", "20"), ("hull", "30"), ("hull, at most two", "30")):
        cells = [_apart(rule, total, "kNN, two updates each", s) for s in (*TEXTS, "all")]
        lines.append([rule, total, *cells])
    header = ["points from kNN with two updates each, at the same passes", "updates"]
    return table([*header, *TEXTS.values(), "all"], lines)


@generated
def cap_apart() -> str:
    lines = []
    for total in ("10", "20", "30", "50"):
        cells = [_apart("hull, at most two", total, "hull", subset) for subset in (*TEXTS, "all")]
        lines.append([total, *cells])
    header = ["points from the plain hull at the same passes, updates", *TEXTS.values(), "all"]
    return table(header, lines)


def no_winner() -> str:
    """The line of the README that says where the hull does not win."""
    apart = {s: _apart("hull", "30", "kNN, two updates each", s) for s in TEXTS}
    return (
        "The hull does not win everywhere. At equal passes, two updates a gradient, it is apart "
        "from plain nearest neighbours by "
        + ", ".join(f"{apart[s]} ({name})" for s, name in TEXTS.items())
        + " points of bits per byte in % of the unadapted model (minus is better)."
    )
