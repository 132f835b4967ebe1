# SPDX-License-Identifier: Apache-2.0
"""The stand-in of a package of HullFT's shape."""

from __future__ import annotations

import importlib
from typing import Any

PACKAGE = "hullft_shaped"


def module(name: str) -> Any:
    return importlib.import_module(f"{PACKAGE}.{name}")
