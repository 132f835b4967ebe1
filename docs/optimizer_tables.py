# SPDX-License-Identifier: Apache-2.0
"""The generated blocks about optimizers."""

from __future__ import annotations

from rows import H100, Row, figure, find, generated, model_name, source, table, times

MODEL = "GPT-2 small, 148 tensors, 124439808 parameters"
H100_STEPS = {"file": "gpu", "device": H100, "commit": "c0127e0"}
H200_STEPS = {"file": "gpu", "device": "NVIDIA H200", "commit": "45e138b"}
CPU_STEPS = {"file": "cpu", "device": "AMD EPYC", "commit": "ac4e139"}


def step(where: dict[str, str], provider: str, **wanted: str) -> Row:
    """Of several runs the first."""
    shape = {"dtype": "float32", "shape": MODEL, **wanted}
    columns = {key: value for key, value in where.items() if key != "file"}
    found = find(where["file"], op="optimizer step", provider=provider, **columns, **shape)
    return found[0]


def _step_ms(where: dict[str, str], provider: str, **wanted: str) -> float:
    return float(step(where, provider, **wanted)["p50"])


@generated
def optimizers() -> str:
    lines = []
    for k in (1, 2, 4, 8):
        line = [f"k = {k}"]
        for where in (H100_STEPS, H200_STEPS, CPU_STEPS):
            ours = _step_ms(where, f"hullkit Adam k={k}")
            line.append(figure(ours))
            if where is not CPU_STEPS:
                line.append(figure(ours / _step_ms(where, "copy of 7 words")))
            line.append(times(k * _step_ms(where, "torch fused Adam") / ours))
        lines.append(line)
    fused = "k by torch's fused Adam"
    header = ["k updates, one gradient", "H100, ms", "copies", fused]
    header += ["H200, ms", "copies", fused, "CPU, ms", fused]
    places = (H100_STEPS, H200_STEPS, CPU_STEPS)
    sources = [source(step(where, "hullkit Adam k=1")) for where in places]
    return table(header, lines) + "\n\n" + "\n".join(sources)


@generated
def optimizers_others() -> str:
    lines = []
    for name, provider in (
        ("`torch._foreach_add_`", "torch _foreach_add_"),
        ("`accumulate_`, float32 gradients", "hullkit accumulate_ float32"),
        ("`accumulate_`, bfloat16 gradients", "hullkit accumulate_ bfloat16"),
        ("torch's SGD with momentum (foreach, its default), one update", "torch SGD, momentum"),
        ("`SGD` with momentum, four updates", "hullkit SGD k=4, momentum"),
        ("`Adam`, two updates, gradient clipped", "hullkit Adam k=2, clipped"),
    ):
        places = (H100_STEPS, H200_STEPS, CPU_STEPS)
        lines.append([name, *(figure(_step_ms(where, provider)) for where in places)])
    return table(["call", "H100, ms", "H200, ms", "CPU, ms"], lines)


@generated
def optimizers_halves() -> str:
    models = {
        model_name("GPT-2 small"): MODEL,
        "Llama-3.2-1B": "Llama-3.2-1B, 146 tensors, 1235814400 parameters",
    }
    lines = []
    for model, shape in models.items():
        for dtype in ("bfloat16", "float16"):
            copy = _step_ms(H100_STEPS, "copy of its bytes", shape=shape, dtype=dtype)
            for k in (1, 2, 8):
                provider = f"hullkit Adam k={k}, stochastic"
                ours = _step_ms(H100_STEPS, provider, shape=shape, dtype=dtype)
                lines.append([model, dtype, f"k = {k}", figure(ours), figure(ours / copy)])
    return table(["model", "weights", "updates", "H100, ms", "copies"], lines, 3)


@generated
def optimizers_host() -> str:
    lines = []
    for provider in ("torch fused Adam (host)", "hullkit Adam k=2 (host)"):
        for row in find("gpu", op="optimizer step", provider=provider, shape=MODEL):
            took = figure(1000 * float(row["p50"]))
            lines.append([provider.removesuffix(" (host)"), row["device"], row["commit"], took])
    return table(["a step keeps the host busy", "device", "commit", "µs"], lines, 3)


@generated
def adam_products() -> str:
    """Updates that multiply their gradients, beside torch's products and updates after them."""
    found = find("gpu", op="Adam products")
    found = [row for row in found if row["commit"] == found[-1]["commit"]]
    times = {(row["shape"], row["provider"]): 1e3 * float(row["p50"]) for row in found}
    lines: dict[str, list[str]] = {}
    tokens = []
    for row in found:
        if row["provider"] == "fused":
            name, facts = row["shape"].rsplit(" tokens=", 1)
            tokens.append(facts.split()[0])
            own, apart = times[row["shape"], "fused"], times[row["shape"], "product and Adam"]
            cells = lines.setdefault(f"{name}, {row['dtype']}", [])
            cells += [figure(own), figure(apart), f"{apart / own:.2f}x"]
    header = ["a layer's weight"]
    for number in dict.fromkeys(tokens):
        header += [f"{number} tokens: µs", "product and Adam, µs", "ratio"]
    rows = [[name, *cells] for name, cells in lines.items()]
    return table(header, rows) + "\n\n" + source(found[0])
