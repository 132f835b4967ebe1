# SPDX-License-Identifier: Apache-2.0
"""The rules that are compared: how examples are chosen, visited and paid for."""

from __future__ import annotations

from typing import Any, NamedTuple


class Rule(NamedTuple):
    """A way to spend forward-backward passes on a query.

    method, cap, noise: options of `hullkit.select`.
    refresh_interval: updates with one gradient, at most.
    order: "select": as `select` returns the examples; "reversed": the last one first; "nearest":
        by inner product with the query; "chosen": SIFT's own sequence, a repeat where it occurs.
    stretch: factor of the query. The hull's objective `|q s - x|^2 / 2` is `|q - x|^2 / 2` less
        `(s - 1) <q, x>`: above 1 it gives up reconstruction for nearness.
    join: neighbours in the order share a pass while they have at most so many tokens; 0: never.
    """

    method: str
    refresh_interval: int = 1
    cap: int | None = None
    order: str = "select"
    stretch: float = 1.0
    join: int = 0
    noise: float | None = None

    def options(self) -> dict[str, Any]:
        given: dict[str, Any] = {"method": self.method, "max_multiplicity": self.cap}
        return given if self.noise is None else given | {"noise": self.noise}


# Every one is judged at its own best learning rate.
RULES = {
    "kNN": Rule("knn"),
    "kNN x 2": Rule("knn", 2, 2),
    "SIFT": Rule("sift", order="chosen"),
    "SIFT, two updates": Rule("sift", 2),
    "hull": Rule("hull", 2),
    "hull, at most 2": Rule("hull", 2, 2),
    "kNN, joined to 1024": Rule("knn", join=1024),
}
# As published, at the published learning rate.
PUBLISHED_RULE = "hull"
PUBLISHED_LR = 5e-5
PUBLISHED_BETAS = (0.9, 0.999)

# What else might be worth its seconds: looked at on the calibration queries.
IDEAS = {
    "kNN, farthest first": Rule("knn", order="reversed"),
    "kNN x 4": Rule("knn", 4, 4),
    "kNN, joined to 512": Rule("knn", join=512),
    "SIFT, by first choice": Rule("sift"),
    "SIFT, farthest first": Rule("sift", order="reversed"),
    "SIFT, noise 0.2": Rule("sift", order="chosen", noise=0.2),
    "SIFT, noise 1": Rule("sift", order="chosen", noise=1.0),
    "SIFT, at most 1": Rule("sift", cap=1),
    "hull, at most 1": Rule("hull", 1, 1),
    "hull, at most 1, nearest first": Rule("hull", 1, 1, order="nearest"),
    "hull, at most 1, stretched 1.2": Rule("hull", 1, 1, stretch=1.2),
    "hull, at most 1, stretched 1.5": Rule("hull", 1, 1, stretch=1.5),
    "hull, at most 1, stretched 2": Rule("hull", 1, 1, stretch=2.0),
    "hull, at most 1, stretched 3": Rule("hull", 1, 1, stretch=3.0),
    "hull, one update": Rule("hull"),
    "hull, one update, stretched 1.5": Rule("hull", stretch=1.5),
    "hull, at most 2, stretched 1.5": Rule("hull", 2, 2, stretch=1.5),
    "hull, lightest first": Rule("hull", 2, order="reversed"),
}
EVERY = RULES | IDEAS


class Cell(NamedTuple):
    """A rule with what it may spend, and Adam's settings."""

    rule: str
    budget: int  # passes
    lr: float
    betas: tuple[float, float] = PUBLISHED_BETAS


STEPS = (5e-5, 1e-4, 2e-4, 4e-4)
LORA_STEPS = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
ADAPTERS = ("lora", "many")  # the paths that train adapters


def rates(path: str, rule: Rule, steps: list[float] | None) -> list[float]:
    """The learning rates that are tried. k updates with one gradient are tried at a k-th of them:
    that is the control which tells reuse from a larger step."""
    tried = steps or (LORA_STEPS if path in ADAPTERS else STEPS)
    return [float(f"{step / rule.refresh_interval:.6g}") for step in tried]
