# SPDX-License-Identifier: Apache-2.0
"""The demo's two pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import methods
import numpy as np
from methods import Outcome, Plan

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt

INK, GREY = "#22223b", "#9a9aa8"
HULL_COLOUR, KNN_COLOUR, TWICE_COLOUR = "#d1495b", "#30638e", "#2a9d8f"
STYLES = {
    methods.HULL: (HULL_COLOUR, "o"),
    methods.HULL_PLAIN: (HULL_COLOUR, "s"),
    methods.KNN: (KNN_COLOUR, "D"),
    methods.KNN_SAME_PASSES: (KNN_COLOUR, "v"),
    methods.KNN_TWICE: (TWICE_COLOUR, "^"),
    methods.KNN_TWICE_SAME_PASSES: (TWICE_COLOUR, "P"),
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


def save_time_picture(means: Sequence[Outcome], num_queries: int, path: Path) -> None:
    """BPB against seconds per query (selection + finetuning), one mark a method, means."""
    figure, axes = plt.subplots(figsize=(8.0, 5.6), layout="constrained")
    for mean in means:
        if mean.method == methods.BASE:
            axes.axhline(mean.bpb, color=GREY, linestyle="--", linewidth=1, label="base, unadapted")
            continue
        colour, marker = STYLES[mean.method]
        label = f"{mean.method}  ({mean.distinct:.0f} ex., {mean.updates:.0f} upd., "
        label += f"{mean.passes:.0f} passes)"
        axes.scatter(
            mean.seconds, mean.bpb, s=110, color=colour, marker=marker, label=label, zorder=3,
            edgecolor="white", linewidth=0.8,
        )  # fmt: skip
    by_name = {mean.method: mean for mean in means}
    for pair in (
        (methods.HULL, methods.HULL_PLAIN),
        (methods.KNN_SAME_PASSES, methods.KNN),
        (methods.KNN_TWICE, methods.KNN_TWICE_SAME_PASSES),
    ):
        ends = [by_name[name] for name in pair]
        axes.plot(
            [end.seconds for end in ends], [end.bpb for end in ends], color=STYLES[pair[0]][0],
            linewidth=1.2, alpha=0.5, zorder=2,
        )  # fmt: skip
    axes.set_xlim(0, 1.08 * max(mean.seconds for mean in means))
    axes.margins(y=0.12)
    axes.grid(axis="y", color="#ececf1")
    axes.set_axisbelow(True)
    axes.set_xlabel("selection + finetuning, seconds per query")
    axes.set_ylabel("bits per byte (lower is better)")
    axes.set_title(f"Test-time finetuning, mean of {num_queries} queries", color=INK)
    figure.legend(loc="outside lower left", ncols=2, fontsize=8.5, labelspacing=0.9)
    figure.savefig(path)
    plt.close(figure)


def save_hull_picture(
    pool: np.ndarray, query: np.ndarray, candidates: np.ndarray, plan: Plan, name: str, path: Path
) -> None:
    """One query's hull in the plane of the candidates' two principal axes.

    pool [M, d], query [d], candidates [n] rows of the pool. The picture is a shadow: distances in
    it are at most the true ones, which the title states.
    """
    points = pool[candidates].astype(np.float64)  # [n, d]
    support = pool[plan.rows].astype(np.float64)  # [s, d]
    counts = np.array(plan.counts)
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
    for count in sorted(set(plan.counts)):
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
        f"A query from {name}: {len(counts)} examples for {counts.sum()} updates\n"
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
