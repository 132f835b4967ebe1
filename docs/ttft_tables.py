# SPDX-License-Identifier: Apache-2.0
"""The generated blocks about what finetuning for a query costs, and what it buys."""

from __future__ import annotations

from collections.abc import Callable

import selection_tables
from rows import (
    Row,
    figure,
    find,
    generated,
    gpu_name,
    measured,
    model_name,
    one,
    source,
    table,
    times,
    when_measured,
)

GPU, CPU, SMALL = "ttft_gpu", "ttft_cpu", "ttft_gpu_pybytes"
ALL = "mean of subsets"
NAMES = {
    "python": "Python",
    "kernel_docs": "kernel docs",
    "sotu": "speeches",
    "deb_control": "package descriptions",
    "stdlib": "standard library",
    ALL: "mean",
}
PUBLISHED_LR, PUBLISHED_BETA2 = "5e-05", "0.999"
RIVALS = ("SIFT", "hull", "hull, at most 2")
WAYS = {
    "published": "published procedure, float32",
    "float32": "float32",
    "bf16": "float32 weights, bf16 passes",
    "bfloat16": "bfloat16 weights",
    "lora": "LoRA, bf16 passes",
    "many": "LoRA of {slots} prompts at once",
}


def triple(row: Row, name: str, sign: str = "") -> str:
    """The mean and its 95 % interval; nothing where there was nothing to compare with."""
    if row[name] == "":
        return ""
    mean, low, high = (f"{float(row[name + end]):{sign}.1f}" for end in ("", "_low", "_high"))
    return f"{mean} [{low}, {high}]"


def judged(name: str, **wanted: str) -> list[Row]:
    return find(name, phase="judge", **wanted)


def main_path(name: str) -> str:
    """The path on which every rule was judged: the first."""
    return judged(name)[0]["path"]


def best(name: str, rule: str, budget: str, subset: str, path: str | None = None) -> Row:
    wanted = {"rule": rule, "budget": budget, "subset": subset, "beta2": PUBLISHED_BETA2}
    return one(name, phase="judge", best="yes", path=path or main_path(name), **wanted)


def budgets(name: str) -> list[str]:
    found = {row["budget"] for row in judged(name, path=main_path(name), rule="kNN")}
    return sorted(found, key=int)


def subsets(name: str) -> list[str]:
    found = dict.fromkeys(row["subset"] for row in judged(name) if row["subset"] != ALL)
    return [*found, *([ALL] if len(found) > 1 else [])]


def overall(name: str) -> str:
    return subsets(name)[-1]


def rules(name: str) -> list[str]:
    """Those that were judged at every budget."""
    found = judged(name, path=main_path(name), subset=overall(name), best="yes")
    found = [row for row in found if row["beta2"] == PUBLISHED_BETA2]
    asked = {(row["rule"], row["budget"]) for row in found}
    every = sorted({row["rule"] for row in found}, key=lambda rule: (rule.lower(), rule))
    return [rule for rule in every if all((rule, budget) in asked for budget in budgets(name))]


def _verdict(cells: list[Row]) -> str:
    """The rule whose differences from kNN lie below 0, the lowest of several; or kNN, with the
    rules whose interval holds 0."""
    ahead = [row for row in cells if float(row["from_knn_high"]) < 0.0]
    if ahead:
        return min(ahead, key=lambda row: float(row["from_knn"]))["rule"]
    alike = [row["rule"] for row in cells if float(row["from_knn_low"]) <= 0.0]
    return " or ".join(["kNN", *alike])


def _winners(name: str, budget: str) -> str:
    lines = []
    for subset in subsets(name):
        if subset == ALL:
            continue
        cells = [best(name, rule, budget, subset) for rule in RIVALS]
        knn = triple(best(name, "kNN", budget, subset), "percent")
        apart = [triple(row, "from_knn", "+") for row in cells]
        lines.append([NAMES[subset], knn, *apart, _verdict(cells)])
    header = [f"{budget} passes, each rule at its best rate", "kNN", *RIVALS, "best"]
    return table(header, lines)


@generated
def ttft_winners() -> str:
    """Who wins where, at the middle budget."""
    if not measured(GPU):
        return selection_tables.no_winner()
    return _winners(GPU, budgets(GPU)[1])


def _rules(name: str) -> str:
    lines = []
    for budget in budgets(name):
        for rule in rules(name):
            row = best(name, rule, budget, overall(name))
            apart = [triple(row, f"from_knn{at}", "+") for at in ("", "_at_seconds")]
            rate, percent = f"{float(row['lr']):g}", triple(row, "percent")
            lines.append([budget, rule, rate, percent, *apart, _ms(row), _joules(row)])
    header = ["passes", "rule", "its best rate", "% of base", "from kNN at equal passes"]
    header += ["at equal seconds", "ms", "joules"]
    row = best(name, "kNN", budgets(name)[0], overall(name))
    return table(header, lines, 3) + "\n\n" + source(row) + _tried_elsewhere(name, row)


def _tried_elsewhere(name: str, row: Row) -> str:
    """Where the rates were tried, if that was not on the device of the judged rows."""
    tried = find(name, phase="calibrate", path=row["path"], rule="kNN")[0]
    if tried["device"] == row["device"]:
        return ""
    return f" The rates were tried on an {gpu_name(tried)}, at commit {tried['commit']}."


def _ms(row: Row) -> str:
    return f"{1e3 * float(row['seconds']):.0f}"


def _joules(row: Row) -> str:
    return row["joules"] if row["joules"] == "not available" else figure(float(row["joules"]))


@generated
@when_measured(GPU)
def ttft_rules() -> str:
    return _rules(GPU)


@generated
@when_measured(CPU)
def ttft_rules_cpu() -> str:
    return _rules(CPU)


@generated
@when_measured(GPU)
def ttft_subsets() -> str:
    lines = []
    for subset in subsets(GPU):
        for budget in budgets(GPU):
            apart = [
                triple(best(GPU, rule, budget, subset), "from_knn", "+")
                for rule in rules(GPU)
                if rule != "kNN"
            ]
            knn = triple(best(GPU, "kNN", budget, subset), "percent")
            lines.append([NAMES[subset], budget, knn, *apart])
    header = ["texts", "passes", "kNN, % of base", *(r for r in rules(GPU) if r != "kNN")]
    return table(header, lines, 2)


def _reuse(name: str) -> str:
    """The control: k updates with one gradient against one update of k times the rate."""
    found = find(name, phase="calibrate", subset=overall(name), path=main_path(name))
    steps = {
        (row["rule"], row["budget"], f"{float(row['lr']) * k:g}"): row
        for rule, k in (("kNN", 1), ("kNN x 2", 2))
        for row in found
        if row["rule"] == rule
    }
    lines = []
    for budget in budgets(name):
        for step in sorted({float(step) for *_, step in steps}):
            cells = [steps[rule, budget, f"{step:g}"] for rule in ("kNN", "kNN x 2")]
            lines.append([budget, f"{step:g}", *(triple(row, "percent") for row in cells)])
    header = ["passes", "learning rate times updates", "one update a gradient", "two"]
    return table(header, lines, 2)


@generated
@when_measured(GPU)
def ttft_reuse() -> str:
    return _reuse(GPU)


@generated
@when_measured(CPU)
def ttft_reuse_cpu() -> str:
    return _reuse(CPU)


def _published(name: str) -> str:
    """The published loop at its settings, and hullkit's rows of the same settings: on the path of
    all rules, and in float32. A ratio is of one device."""
    lines, sources = [], {}
    for row in judged(name, path="published", subset=overall(name)):
        wanted = {key: row[key] for key in ("rule", "budget", "subset")}
        for path in dict.fromkeys((main_path(name), "float32")):
            for ours in judged(name, path=path, lr=PUBLISHED_LR, **wanted):
                same = ours["device"] == row["device"]
                ratio = times(float(row["seconds"]) / float(ours["seconds"])) if same else ""
                apart = triple(row, "from_first_path", "+") if path == main_path(name) else ""
                costs = [_ms(row), _ms(ours), ratio, _joules(row), _joules(ours)]
                place = [row["budget"], WAYS[path], gpu_name(ours), row["queries"]]
                lines.append([*place, apart, *costs])
                sources |= {WAYS[row["path"]]: source(row), WAYS[path]: source(ours)}
    header = ["passes of hull", "hullkit's passes", "its device", "queries", "points from hullkit"]
    header += ["published, ms", "hullkit, ms", "ratio", "published, joules", "hullkit, joules"]
    told = "\n".join(f"{way[0].upper()}{way[1:]}: {text}" for way, text in sources.items())
    return table(header, lines, 3) + f"\n\n{told}"


@generated
@when_measured(GPU)
def ttft_published() -> str:
    return _published(GPU)


@generated
@when_measured(CPU)
def ttft_published_cpu() -> str:
    return _published(CPU)


@generated
@when_measured(GPU)
def ttft_exact() -> str:
    """float32 passes beside the published loop: the same examples, rate and updates."""
    lines = []
    found = [row for row in judged(GPU, path="float32") if row["bpb_from_published"]]
    for row in found:
        settings = {key: row[key] for key in ("rule", "budget", "lr", "subset")}
        published = one(GPU, phase="judge", path="published", **settings)
        cells = [f"{float(r['percent']):.4f}" for r in (published, row)]
        apart = f"{float(row['bpb_from_published']):+.1e}"
        ends = ", ".join(f"{float(row['bpb_from_published' + e]):+.1e}" for e in ("_low", "_high"))
        lines.append([NAMES[row["subset"]], row["queries"], *cells, f"{apart} [{ends}]"])
    header = [f"{found[0]['budget']} passes of {found[0]['rule']}", "queries"]
    header += ["published, % of base", "float32, % of base", "difference of BPB, relative"]
    told = [f"{way}: {source(r)}" for way, r in (("Published", published), ("float32", row))]
    return table(header, lines) + "\n\n" + "\n".join(told)


@generated
@when_measured(GPU)
def ttft_paths() -> str:
    """Other precisions and adapters, on the queries that each was judged on."""
    budget = budgets(GPU)[1]
    wanted = {"rule": "kNN", "budget": budget, "beta2": PUBLISHED_BETA2}
    found = judged(GPU, subset=ALL, best="yes", **wanted)
    found = [row for row in found if row["path"] != "published"]
    lines = []
    for row in sorted(found, key=lambda row: list(WAYS).index(row["path"])):
        costs = [_ms(row), _joules(row), f"{float(row['peak_mb']):.0f}", gpu_name(row)]
        rate, percent = f"{float(row['lr']):g}", triple(row, "percent")
        name = WAYS[row["path"]].format(slots=row["slots"])
        lines.append([name, row["queries"], rate, percent, *costs])
    header = [f"{budget} passes of kNN", "queries", "rate", "% of base", "ms", "joules"]
    return table([*header, "peak MB", "device"], lines)


@generated
@when_measured(GPU)
def ttft_ideas() -> str:
    """What was tried on the calibration queries, each at the better of two rates."""
    found = find(GPU, phase="explore", subset=ALL)
    budget = found[0]["budget"]
    tried: dict[tuple[str, str, str], Row] = {}
    for row in [*found, *find(GPU, phase="calibrate", subset=ALL, budget=budget)]:
        key = (row["rule"], row["beta1"], row["beta2"])
        kept = tried.get(key)
        if kept is None or float(row["percent"]) < float(kept["percent"]):
            tried[key] = row
    lines = []
    for (rule, *betas), row in sorted(tried.items(), key=lambda item: float(item[1]["percent"])):
        rate, percent = f"{float(row['lr']):g}", triple(row, "percent")
        lines.append([rule, ", ".join(betas), rate, percent, _ms(row)])
    header = [f"{budget} passes", "betas", "rate", "% of base", "ms"]
    return table(header, lines, 2) + "\n\n" + source(found[0])


@generated
@when_measured(GPU)
def ttft_recipe() -> str:
    """Judged cells that are none of the rules: against kNN and SIFT at their best rates."""
    shown = [
        row
        for row in judged(GPU, path=main_path(GPU), subset=ALL, best="yes")
        if row["rule"] not in ("kNN", "SIFT") or row["beta2"] != PUBLISHED_BETA2
    ]
    lines = []
    for row in shown:
        apart = [triple(row, f"from_{rival}", "+") for rival in ("knn", "sift", "knn_at_seconds")]
        settings = [row["rule"], f"{row['beta1']}, {row['beta2']}", row["budget"], row["lr"]]
        lines.append([*settings, triple(row, "percent"), *apart, _ms(row)])
    header = ["rule", "betas", "passes", "rate", "% of base", "from kNN", "from SIFT"]
    header += ["from kNN at equal seconds", "ms"]
    return table(header, lines, 2) + "\n\n" + source(row)


def _between(row: Row, name: str, factor: float = 1.0) -> str:
    """A cost with its interval over queries."""
    if row[name] == "not available":
        return row[name]
    mean, low, high = (figure(factor * float(row[name + end])) for end in ("", "_low", "_high"))
    return f"{mean} [{low}, {high}]"


def _alone(name: str, budget: str) -> str:
    row = best(name, "kNN", budget, overall(name))
    parts = ["retrieve_ms", "select_ms", "adapt_ms", "restore_ms"]
    retrieval, selection, adaptation, restoring = (figure(float(row[p]), 2) for p in parts)
    return (
        f"**One at a time, on {gpu_name(row)}{_threads(row)}**: {model_name(row['model'])}, "
        f"nearest neighbours, {budget} passes: a query takes {_between(row, 'seconds', 1e3)} ms"
        f"{_energy(row, _between(row, 'joules'))} and lowers bits per byte by {_bought(row)}. "
        f"Retrieval is {retrieval} ms of it, selection {selection}, passes and updates "
        f"{adaptation}, restoring {restoring}."
    )


def _together(name: str, budget: str) -> str:
    """Many prompts share a stream: each has an equal part of its cost."""
    wanted = {"rule": "kNN", "budget": budget, "subset": overall(name), "best": "yes"}
    for row in judged(name, path="many", **wanted):
        alone = judged(name, path="lora", device=row["device"], **wanted)
        one_of = f", {_ms(alone[0])} ms one at a time" if alone else ""
        streams = [
            one(name, phase="judge", path="many", **wanted | {"subset": subset})
            for subset in subsets(name)
            if subset != wanted["subset"]
        ]
        joules = _energy(row, _joules(row)) + _range(streams, _joules)
        return (
            f"**Many together, on {gpu_name(row)}{_threads(row)}**: adapters of {row['slots']} "
            f"prompts at once, the same passes: {_ms(row)} ms a query{_range(streams, _ms)}"
            f"{joules}{one_of}. They lower bits per byte by {_bought(row)}."
        )
    return "Many together: not measured yet."


def _threads(row: Row) -> str:
    return {"1": ", one thread", "2": ", two threads"}.get(row["threads"], "")


def _range(streams: list[Row], shown: Callable[[Row], str]) -> str:
    """From the cheapest text's stream to the dearest's; of one stream there is no range."""
    values = [shown(row) for row in streams if row["joules"] != "not available" or shown is _ms]
    return f" ({min(values, key=float)} to {max(values, key=float)} by text)" if values else ""


def _energy(row: Row, joules: str) -> str:
    counted = row["joules"] != "not available"
    return f" and {joules} joules" if counted else " (nothing counts its joules)"


def _bought(row: Row) -> str:
    mean, low, high = (f"{100 - float(row['percent' + end]):.1f}" for end in ("", "_high", "_low"))
    return f"{mean} % [{low}, {high}]"


@generated
@when_measured(GPU)
def ttft_cost() -> str:
    return _alone(GPU, budgets(GPU)[1]) + "\n\n" + _together(GPU, budgets(GPU)[1])


@generated
@when_measured(CPU)
def ttft_cost_cpu() -> str:
    return _alone(CPU, budgets(CPU)[-1]) + "\n\n" + _together(CPU, budgets(CPU)[-1])
