# SPDX-License-Identifier: Apache-2.0
"""The demo's two pictures."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

from bench.demo.report import Line, Story
from bench.ttft.choices import selected
from bench.ttft.corpora import Corpus
from bench.ttft.rules import PUBLISHED_RULE, RULES

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt

PICTURED = 16  # updates of the hull
INK, GREY = "#22223b", "#9a9aa8"
HULL_COLOUR = "#d1495b"
COLOURS = {
    "kNN": "#30638e",
    "SIFT": "#2a9d8f",
    "hull": "#d1495b",
    "hull, at most 2": "#e09f3e",
}
plt.rcParams.update(
    {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": GREY,
        "axes.labelcolor": INK,
        "axes.titlesize": 12,
        "axes.titlelocation": "left",
        "legend.frameon": False,
        "savefig.dpi": 160,
        "savefig.bbox": "tight",
    }
)


def save_time_picture(story: Story, path: Path) -> None:
    """BPB against seconds a query on a logarithmic axis, means; a mark for each number of passes.

    The arrows lead from the published loop to the same settings in hullkit.
    """
    figure, axes = plt.subplots(figsize=(8.0, 5.0), layout="constrained")
    axes.axhline(story.base, color=GREY, linestyle="--", linewidth=1)
    axes.annotate(
        "base, unadapted", (0.99, story.base), xycoords=("axes fraction", "data"), ha="right",
        va="bottom", color=GREY, fontsize=9,
    )  # fmt: skip
    _curve(axes, story.published, "published procedure, its own loop", INK, "s", True)
    _curve(axes, story.same, "the same settings in hullkit", INK, "o", True)
    for theirs, ours in zip(story.published, story.same, strict=True):
        axes.annotate(
            "", (ours.seconds, ours.bpb), (theirs.seconds, theirs.bpb),
            arrowprops={"arrowstyle": "->", "color": INK, "linestyle": ":", "shrinkA": 6,
                        "shrinkB": 6},
        )  # fmt: skip
    for rule, colour in COLOURS.items():
        lines = [line for line in story.own if line.label == rule]
        told = len(lines) > 1 and rule == "kNN"
        _curve(axes, lines, f"{rule}, at its best learning rate", colour, "D", told)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.margins(x=0.12, y=0.12)
    axes.grid(color="#ececf1", which="both")
    axes.set_axisbelow(True)
    axes.set_xlabel("selection, finetuning and restoring: seconds a query")
    axes.set_ylabel("bits per byte (lower is better)")
    passes = ", ".join(str(line.cell.budget) for line in story.same)
    axes.set_title(
        f"Test-time finetuning, {passes} passes a query, mean of {story.queries} queries", color=INK
    )
    figure.legend(loc="outside lower left", ncols=2, fontsize=8.5)
    figure.savefig(path)
    plt.close(figure)


def _curve(
    axes: plt.Axes, lines: list[Line], label: str, colour: str, marker: str, told: bool
) -> None:
    """told: whether marks say their number of passes."""
    seconds, bpb = [line.seconds for line in lines], [line.bpb for line in lines]
    axes.plot(
        seconds, bpb, color=colour, marker=marker, markersize=9, linewidth=1.2,
        markeredgecolor="white", label=label, zorder=3,
    )  # fmt: skip
    for line in lines if told else ():
        axes.annotate(
            f"{line.cell.budget} passes", (line.seconds, line.bpb), (0, -16), fontsize=8,
            textcoords="offset points", ha="center", color=colour,
        )  # fmt: skip


def save_hull_picture(text: Corpus, path: Path) -> None:
    """The first query's hull in the plane of its candidates' two principal axes.

    The picture is a shadow: distances in it are at most the true ones, which the title states.
    """
    data = text.data._replace(query=text.data.query[0], candidates=text.data.candidates[0])
    multiset = selected(RULES[PUBLISHED_RULE], data, PICTURED)
    kept = multiset.counts > 0
    counts = multiset.counts[kept].numpy()
    pool, query = data.pool.numpy(), data.query.numpy()
    points = pool[data.candidates].astype(np.float64)  # [n, d]
    support = pool[multiset.rows[kept]].astype(np.float64)  # [s, d]
    reconstruction = counts @ support / counts.sum()
    centre = points.mean(0)
    _, _, axes_of_pool = np.linalg.svd(points - centre, full_matrices=False)
    plane = axes_of_pool[:2].T  # [d, 2]
    flat, chosen = (points - centre) @ plane, (support - centre) @ plane
    target, rebuilt = (query - centre) @ plane, (reconstruction - centre) @ plane

    figure, axes = plt.subplots(figsize=(8.4, 5.6), layout="constrained")
    axes.scatter(*flat.T, s=14, color=GREY, alpha=0.55, label=f"candidates ({len(flat)})")
    outline = chosen[convex_outline(chosen)]
    axes.fill(*outline.T, facecolor=HULL_COLOUR, alpha=0.10, edgecolor=HULL_COLOUR, linewidth=1)
    for count in np.unique(counts):
        mine = chosen[counts == count]
        plural = "s" if count > 1 else ""
        axes.scatter(
            *mine.T, s=45 * count, color=HULL_COLOUR, alpha=0.75, edgecolor="white", zorder=3,
            label=f"support, {count} update{plural}",
        )  # fmt: skip
    axes.plot(*np.stack([target, rebuilt]).T, color=INK, linewidth=1, linestyle=":", zorder=4)
    axes.scatter(
        *target, s=230, marker="*", color="#f4a300", edgecolor=INK, zorder=5, label="query"
    )
    axes.scatter(
        *rebuilt, s=80, marker="X", color=INK, edgecolor="white", zorder=5, label="reconstruction"
    )
    residual = np.linalg.norm(query - reconstruction)
    nearest = np.linalg.norm(query - points, axis=1).min()
    axes.set_title(
        f"One query: {len(counts)} examples for {counts.sum()} updates\n"
        f"distance to the query in all {pool.shape[1]} dimensions: reconstruction {residual:.3f}, "
        f"nearest candidate {nearest:.3f}",
        color=INK,
    )
    axes.set_xlabel("first principal axis of the candidates")
    axes.set_ylabel("second principal axis")
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), labelspacing=1.1)
    figure.savefig(path)
    plt.close(figure)


def convex_outline(points: np.ndarray) -> list[int]:
    """Indices of the corners of the points' convex hull in the plane, in order (monotone chain)."""
    order = sorted(range(len(points)), key=lambda i: tuple(points[i]))
    corners: list[int] = []
    for half in (order, order[::-1]):
        start = len(corners)
        for i in half:
            while len(corners) >= start + 2:
                a, b = points[corners[-2]], points[corners[-1]]
                ab, ac = b - a, points[i] - a
                if ab[0] * ac[1] > ab[1] * ac[0]:  # a left turn
                    break
                corners.pop()
            corners.append(i)
        corners.pop()
    return corners or order
