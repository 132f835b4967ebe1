# SPDX-License-Identifier: Apache-2.0
"""Parts of a diagram as SVG text, and the two themes."""

from __future__ import annotations

from typing import NamedTuple

FONT = "font-family='Helvetica, Arial, sans-serif'"


class Theme(NamedTuple):
    ink: str
    faint: str
    box: str
    accent: str
    other: str


THEMES = {
    "light": Theme("#22223b", "#8d8d9b", "#f4f4f8", "#d1495b", "#30638e"),
    "dark": Theme("#ececf4", "#9a9aa8", "#2b2b3c", "#ef7686", "#7fb3dc"),
}


def text(x: float, y: float, words: str, fill: str, size: int = 13, anchor: str = "middle") -> str:
    place = f"x='{x:g}' y='{y:g}' fill='{fill}' font-size='{size}' text-anchor='{anchor}'"
    return f"<text {place} {FONT}>{words}</text>"


def box(
    x: float, y: float, width: float, height: float, fill: str, stroke: str, radius: int = 7
) -> str:
    place = f"x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}' rx='{radius}'"
    return f"<rect {place} fill='{fill}' stroke='{stroke}' stroke-width='1.3'/>"


def dot(x: float, y: float, radius: float, fill: str) -> str:
    return f"<circle cx='{x:g}' cy='{y:g}' r='{radius:g}' fill='{fill}'/>"


def line(
    points: list[tuple[float, float]], stroke: str, arrow: bool = False, dash: str = ""
) -> str:
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    end = " marker-end='url(#tip)'" if arrow else ""
    dashes = f" stroke-dasharray='{dash}'" if dash else ""
    return (
        f"<polyline points='{path}' fill='none' stroke='{stroke}' stroke-width='1.5'{end}{dashes}/>"
    )


def svg(width: int, height: int, title: str, colour: str, parts: list[str]) -> str:
    size = f"viewBox='0 0 {width} {height}' width='{width}' height='{height}'"
    tip = (
        "<defs><marker id='tip' viewBox='0 0 10 10' refX='9' refY='5' markerWidth='7' "
        f"markerHeight='7' orient='auto'><path d='M0,0 L10,5 L0,10 z' fill='{colour}'/>"
        "</marker></defs>"
    )
    head = f"<svg xmlns='http://www.w3.org/2000/svg' {size} role='img' aria-label='{title}'>"
    return "\n".join([head, f"<title>{title}</title>", tip, *parts, "</svg>\n"])
