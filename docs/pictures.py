# SPDX-License-Identifier: Apache-2.0
"""Draws the diagrams of the documentation, each in a light and a dark version.

python docs/pictures.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ttft_pictures
from svg import THEMES, Theme, box, dot, line, svg, text

HERE = Path(__file__).resolve().parent


def loop(theme: Theme) -> str:
    """The life of one prompt."""
    steps = [
        ("embed", "prompt and candidate", "texts become vectors"),
        ("select", "weights that rebuild", "the prompt's vector"),
        ("round", "weights become", "counts of updates"),
        ("finetune", "each gradient serves", "several updates"),
        ("answer", "score or generate", "with the adapted model"),
    ]
    width, gap, top = 150, 22, 18
    parts = []
    for number, (name, first, second) in enumerate(steps):
        x = 12 + number * (width + gap)
        stroke = theme.accent if name in ("select", "round", "finetune") else theme.faint
        parts += [
            box(x, top, width, 78, theme.box, stroke),
            text(x + width / 2, top + 27, name, theme.ink, 17),
            text(x + width / 2, top + 48, first, theme.faint, 12),
            text(x + width / 2, top + 64, second, theme.faint, 12),
        ]
        if number:
            parts.append(line([(x - gap + 2, top + 39), (x - 3, top + 39)], theme.ink, True))
    last = 12 + 4 * (width + gap) + width / 2
    begin = 12 + 3 * (width + gap) + width / 2
    back = [(last, top + 80), (last, top + 112), (begin, top + 112), (begin, top + 82)]
    parts.append(line(back, theme.accent, True))
    middle = (last + begin) / 2
    parts.append(text(middle, top + 130, "restore: base weights, bit for bit", theme.ink, 13))
    left = 12 + 1.5 * (width + gap)
    parts.append(text(left + 55, top + 112, "red: what hullkit does", theme.accent, 13))
    return svg(882, 158, "embed, select, round, finetune, answer, restore", theme.ink, parts)


def hull(theme: Theme) -> str:
    """A prompt outside the hull, its nearest point, and the candidates that make it up."""
    corners = [(60, 190), (110, 60), (230, 36), (310, 120), (270, 215), (140, 235)]
    inner = [(150, 120), (200, 165), (120, 165), (235, 95), (195, 215)]
    path = " ".join(f"{x},{y}" for x, y in corners)
    query, nearest = (352, 45), (292.5, 101.6)  # its foot on the edge between the two
    parts = [f"<polygon points='{path}' fill='{theme.box}' stroke='{theme.faint}'/>"]
    parts += [dot(x, y, 4, theme.faint) for x, y in (*corners, *inner)]
    parts.append(line([query, nearest], theme.ink, dash="4 3"))
    parts += [dot(230, 36, 7, theme.accent), dot(310, 120, 7, theme.accent)]
    parts += [dot(*query, 6, theme.other), dot(*nearest, 5, theme.ink)]
    parts += [
        text(362, 43, "query: the prompt's vector", theme.other, anchor="start"),
        text(344, 80, "dashed: the residual", theme.ink, anchor="start"),
        text(322, 124, "support: candidates with weight", theme.accent, anchor="start"),
        text(322, 170, "hull: all convex combinations", theme.faint, anchor="start"),
        text(322, 188, "of the candidates", theme.faint, anchor="start"),
    ]
    return svg(560, 255, "a query and its nearest point in the hull", theme.ink, parts)


def reuse(theme: Theme) -> str:
    """Counts 3, 2 and 1 with a refresh interval of two."""
    parts = []
    x = 120.0
    bursts = [("A", 2), ("A", 1), ("B", 2), ("C", 1)]
    parts.append(text(104, 44, "gradients", theme.ink, anchor="end"))
    parts.append(text(104, 94, "updates", theme.ink, anchor="end"))
    for name, steps in bursts:
        width = 54 * steps + 8 * (steps - 1)
        parts.append(box(x, 22, width, 34, theme.box, theme.accent))
        parts.append(text(x + width / 2, 44, f"pass over {name}" if steps > 1 else name, theme.ink))
        for step in range(steps):
            left = x + 62 * step
            parts.append(line([(left + 27, 58), (left + 27, 71)], theme.accent, True))
            parts.append(box(left, 74, 54, 30, theme.box, theme.faint))
            parts.append(text(left + 27, 94, name, theme.ink))
        x += width + 14
    words = "counts A 3, B 2, C 1; refresh interval 2: four passes serve six updates"
    parts.append(text(120, 128, words, theme.faint, anchor="start"))
    return svg(600, 140, "gradient reuse", theme.accent, parts)


PICTURES: dict[str, Callable[[Theme], str]] = {
    "loop": loop,
    "hull": hull,
    "reuse": reuse,
    "cost": ttft_pictures.cost,
    "cost_bars": ttft_pictures.bars,
    "joules": ttft_pictures.joules,
    "model_size": ttft_pictures.sizes,
}


def drawn() -> dict[Path, str]:
    """Every file and what it holds."""
    return {
        HERE / f"{name}-{kind}.svg": picture(theme)
        for name, picture in PICTURES.items()
        for kind, theme in THEMES.items()
    }


if __name__ == "__main__":
    for path, content in drawn().items():
        path.write_text(content)
