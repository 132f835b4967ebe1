# SPDX-License-Identifier: Apache-2.0
"""Docstrings name other functions as `:func:`name``; the pages show the name."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):(`[^`]+`)")


class DocstringRoles(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = ROLE.sub(r"\1", obj.docstring.value)
