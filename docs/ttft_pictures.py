# SPDX-License-Identifier: Apache-2.0
"""The pictures about cost: bits per byte over seconds, where time and energy go, model sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable

from rows import Row, gpu_name, measured, model_name, one
from svg import Theme, box, dot, line, svg, text
from ttft_tables import (
    ALL,
    GPU,
    NAMES,
    PUBLISHED_BETA2,
    PUBLISHED_LR,
    SMALL,
    WAYS,
    best,
    budgets,
    judged,
    main_path,
    rules,
    subsets,
)

PANEL_WIDTH, PANEL_HEIGHT, LEFT, TOP = 196, 170, 48, 58
SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Axes:
    """One panel: seconds on a logarithmic axis, BPB in % of the unadapted model on the other."""

    def __init__(self, left: float, seconds: list[float], percents: list[float]) -> None:
        self._left = left
        self._low, self._high = math.log(min(seconds) / 1.25), math.log(max(seconds) * 1.25)
        spare = 0.1 * (max(percents) - min(percents))  # for the numbers beside points
        self._bottom = math.floor(min(percents) - spare)
        self._top = math.ceil(max(percents) + spare)

    def place(self, seconds: float, percent: float) -> tuple[float, float]:
        across = (math.log(seconds) - self._low) / (self._high - self._low)
        up = (percent - self._bottom) / (self._top - self._bottom)
        return self._left + across * PANEL_WIDTH, TOP + (1.0 - up) * PANEL_HEIGHT

    def drawn(self, title: str, theme: Theme) -> list[str]:
        floor = TOP + PANEL_HEIGHT
        parts = [
            text(self._left + PANEL_WIDTH / 2, TOP - 14, title, theme.ink),
            line([(self._left, TOP), (self._left, floor)], theme.faint),
            line([(self._left, floor), (self._left + PANEL_WIDTH, floor)], theme.faint),
        ]
        for seconds in SECONDS:
            if self._low <= math.log(seconds) <= self._high:
                x, _ = self.place(seconds, self._bottom)
                parts.append(line([(x, floor), (x, floor + 4)], theme.faint))
                parts.append(text(x, floor + 18, f"{seconds:g}", theme.faint, 11))
        step = max(1, round((self._top - self._bottom) / 5))
        for percent in range(self._bottom + step, self._top, step):
            _, y = self.place(math.exp(self._low), percent)
            parts.append(line([(self._left - 4, y), (self._left, y)], theme.faint))
            parts.append(text(self._left - 7, y + 4, f"{percent}", theme.faint, 11, "end"))
        return parts


Point = tuple[str, float, float]  # passes, seconds, percent


def _main() -> Row:
    """The row whose device all seconds and joules of a picture are of."""
    return best(GPU, "kNN", budgets(GPU)[1], ALL)


def _curves(subset: str) -> dict[str, list[Point]]:
    """The published loop ran on fewer queries than the others: its seconds are its own, its BPB is
    that of the same settings in hullkit's passes, on all queries."""
    found: dict[str, list[Point]] = {"published": []}
    device = _main()["device"]
    for row in judged(GPU, path="published", subset=subset, rule="hull", device=device):
        settings = {"rule": "hull", "budget": row["budget"], "lr": PUBLISHED_LR}
        same = one(GPU, phase="judge", path=main_path(GPU), subset=subset, **settings)
        found["published"].append((row["budget"], float(row["seconds"]), float(same["percent"])))
    for rule in ("kNN", "hull, at most 2", "kNN, joined to 1024"):
        rows = [best(GPU, rule, budget, subset) for budget in budgets(GPU)]
        found[rule] = [(r["budget"], float(r["seconds"]), float(r["percent"])) for r in rows]
    return found


def _nothing(theme: Theme) -> str:
    return svg(
        420, 40, "not measured yet", theme.ink, [text(210, 25, "not measured yet", theme.ink)]
    )


def cost(theme: Theme) -> str:
    """BPB over seconds a query: the published procedure, and hullkit at the best rates."""
    if not measured(GPU):
        return _nothing(theme)
    colours = {
        "published": theme.other,
        "kNN": theme.accent,
        "hull, at most 2": theme.ink,
        "kNN, joined to 1024": theme.faint,
    }
    words = {
        "published": "published procedure: hull at its published settings, its own loop, float32",
        "kNN": "hullkit, bf16 passes: nearest neighbours at their best rate",
        "hull, at most 2": "hullkit, bf16 passes: hull, at most two updates, at its best rate",
        "kNN, joined to 1024": "hullkit, bf16 passes: nearest neighbours joined to 1024 tokens",
    }
    # The curves fall to the right. Numbers are on the sides where no other curve is.
    aside = {"published": (5, -6), "kNN": (-6, 13)}
    parts: list[str] = []
    panels = [subset for subset in subsets(GPU) if subset != ALL]
    for number, subset in enumerate(panels):
        curves = _curves(subset)
        every = [point for curve in curves.values() for point in curve]
        left = LEFT + number * (PANEL_WIDTH + 46)
        axes = Axes(left, [seconds for _, seconds, _ in every], [percent for *_, percent in every])
        parts += axes.drawn(NAMES[subset], theme)
        for name, curve in curves.items():
            ordered = sorted(curve, key=lambda point: point[1])
            points = [axes.place(seconds, percent) for _, seconds, percent in ordered]
            parts.append(line(points, colours[name]))
            for (budget, *_), (x, y) in zip(ordered, points, strict=True):
                parts.append(dot(x, y, 3.5, colours[name]))
                if name in aside:
                    across, down = aside[name]
                    parts.append(text(x + across, y + down, budget, colours[name], 10))
    floor = TOP + PANEL_HEIGHT
    words_below = f"seconds a query, {gpu_name(_main())}"
    parts.append(text(LEFT, floor + 38, words_below, theme.faint, 12, "start"))
    parts.append(text(6, 16, "bits per byte, % of the unadapted model", theme.faint, 12, "start"))
    for number, (name, told) in enumerate(words.items()):
        y = floor + 58 + 18 * number
        parts += [dot(LEFT + 4, y - 4, 4, colours[name])]
        parts.append(text(LEFT + 14, y, told, theme.ink, 12, "start"))
    parts.append(
        text(LEFT + 500, floor + 58, "numbers at points: passes", theme.faint, 12, "start")
    )
    width = LEFT + len(panels) * (PANEL_WIDTH + 46)
    return svg(width, floor + 122, "bits per byte over seconds a query", theme.ink, parts)


def _bars(rows: Iterable[Row], theme: Theme) -> list[str]:
    named = {
        "retrieve_ms": ("retrieval", theme.faint),
        "select_ms": ("selection", theme.accent),
        "adapt_ms": ("passes and updates", theme.other),
        "restore_ms": ("restoring", theme.ink),
    }
    kept = list(rows)
    longest = max(sum(float(row[name]) for name in named) for row in kept)
    parts: list[str] = []
    for number, row in enumerate(kept):
        y, x = 14 + 26 * number, 190.0
        parts.append(text(180, y + 13, row["rule"], theme.ink, 12, "end"))
        for name, (_, colour) in named.items():
            width = max(1.0, 420 * float(row[name]) / longest)
            parts.append(box(x, y, width, 18, colour, colour, radius=0))
            x += width
        total = sum(float(row[name]) for name in named)
        parts.append(text(x + 8, y + 13, f"{total:.0f} ms", theme.ink, 12, "start"))
    x = 190.0
    for words, colour in named.values():
        y = 30 + 26 * len(kept)
        parts.append(box(x, y - 10, 12, 12, colour, colour, radius=0))
        parts.append(text(x + 18, y, words, theme.ink, 12, "start"))
        x += 40 + 7 * len(words)
    return parts


def bars(theme: Theme) -> str:
    """Where the milliseconds of a query go, by rule, at the middle budget."""
    if not measured(GPU):
        return _nothing(theme)
    rows = [best(GPU, rule, budgets(GPU)[1], ALL) for rule in rules(GPU)]
    parts = _bars(rows, theme)
    parts.append(text(190, 50 + 26 * len(rows), _setting(), theme.faint, 12, "start"))
    return svg(720, 64 + 26 * len(rows), "where the time of a query goes", theme.ink, parts)


def _setting() -> str:
    return f"{budgets(GPU)[1]} passes, {gpu_name(_main())}"


def joules(theme: Theme) -> str:
    """What a query of the middle budget draws, by way of finetuning."""
    if not measured(GPU):
        return _nothing(theme)
    wanted = {"budget": budgets(GPU)[1], "subset": ALL, "best": "yes", "beta2": PUBLISHED_BETA2}
    wanted["device"] = _main()["device"]
    rows = [row for row in judged(GPU, rule="kNN", **wanted) if row["joules"] != "not available"]
    rows += judged(GPU, path="published", rule="hull", **wanted)
    rows.sort(key=lambda row: -float(row["joules"]))
    most = float(rows[0]["joules"])
    parts: list[str] = []
    for number, row in enumerate(rows):
        y, value = 14 + 26 * number, float(row["joules"])
        width = max(1.0, 400 * value / most)
        name = WAYS[row["path"]].format(slots=row["slots"])
        colour = theme.other if row["path"] == "published" else theme.accent
        parts.append(text(220, y + 13, name, theme.ink, 12, "end"))
        parts.append(box(230, y, width, 18, colour, colour, radius=0))
        words = f"{value:.0f} J, {1e3 * float(row['seconds']):.0f} ms"
        parts.append(text(238 + width, y + 13, words, theme.ink, 12, "start"))
    words = f"{_setting()}; kNN at its best rate, published: hull at its settings"
    parts.append(text(230, 30 + 26 * len(rows), words, theme.faint, 12, "start"))
    return svg(770, 44 + 26 * len(rows), "joules a query", theme.ink, parts)


PARAMETERS = {"pybytes": 4.0, "smollm2": 135.0}  # millions


def sizes(theme: Theme) -> str:
    """What a query buys over the size of the model, on the same texts."""
    if not (measured(GPU) and measured(SMALL)):
        return _nothing(theme)
    left, top, width, height = 60.0, 40.0, 300.0, 170.0
    found = {
        name: [best(name, "kNN", budget, ALL) for budget in budgets(name)] for name in (SMALL, GPU)
    }
    most = max(100 - float(row["percent_low"]) for rows in found.values() for row in rows)
    low, high = (math.log(size * way) for size, way in ((4.0, 0.5), (135.0, 2.0)))

    def place(row: Row, end: str, aside: float) -> tuple[float, float]:
        across = (math.log(PARAMETERS[row["model"]]) - low) / (high - low)
        up = (100 - float(row["percent" + end])) / (1.1 * most)
        return left + across * width + aside, top + (1 - up) * height

    floor = top + height
    parts = [
        line([(left, top), (left, floor)], theme.faint),
        line([(left, floor), (left + width, floor)], theme.faint),
        text(6, 22, "bits per byte lowered by, %", theme.faint, 12, "start"),
        text(left, floor + 38, "model, parameters (logarithmic)", theme.faint, 12, "start"),
    ]
    for percent in range(0, int(1.1 * most) + 1, 5):
        y = top + (1 - percent / (1.1 * most)) * height
        parts += [line([(left - 4, y), (left, y)], theme.faint)]
        parts += [text(left - 7, y + 4, f"{percent}", theme.faint, 11, "end")]
    for rows in found.values():
        x, _ = place(rows[0], "", 0)
        name, size = model_name(rows[0]["model"]), f"{PARAMETERS[rows[0]['model']]:.0f}M"
        words = name if name.endswith(size) else f"{name}, {size}"
        parts.append(text(x, floor + 18, words, theme.ink, 11))
    colours = (theme.faint, theme.accent, theme.other)
    for number, (rows, colour) in enumerate(
        zip(zip(*found.values(), strict=True), colours, strict=True)
    ):
        aside = 5.0 * (number - 1)
        parts.append(line([place(row, "", aside) for row in rows], colour))
        for row in rows:
            parts.append(line([place(row, "_low", aside), place(row, "_high", aside)], colour))
            parts.append(dot(*place(row, "", aside), 3.5, colour))
        x, y = place(rows[-1], "", 14 + aside)
        parts.append(text(x, y + 4, f"{rows[-1]['budget']} passes", colour, 11, "start"))
    return svg(480, int(floor) + 50, "gain over the size of the model", theme.ink, parts)
