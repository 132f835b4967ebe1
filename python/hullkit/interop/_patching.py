# SPDX-License-Identifier: Apache-2.0
"""Objects of an importable package replaced by others, and put back."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any, NamedTuple


class _Place(NamedTuple):
    namespace: dict[str, Any]  # of a module, or a dict in one
    key: str
    original: Any
    replacement: Any


class PackagePatch:
    """Replacements for objects of the same names in modules of a package: module=(object, ...)."""

    def __init__(self, **replacements: tuple[Any, ...]) -> None:
        self._replacements = replacements
        self._package = ""  # the patched one, if any
        self._pairs: list[tuple[Any, Any]] = []  # original, replacement
        self._modules: list[ModuleType] = []  # of the package, when it was patched
        self._places: list[_Place] = []

    def apply(self, package: ModuleType | str) -> None:
        if self._package:
            raise RuntimeError(f"patch: expected no patched package, got {self._package} patched")
        name = package if isinstance(package, str) else package.__name__
        pairs = []
        for module_name, replacements in self._replacements.items():
            module = importlib.import_module(f"{name}.{module_name}")
            for replacement in replacements:
                if not hasattr(module, replacement.__name__):
                    raise AttributeError(
                        f"package: expected {module.__name__}.{replacement.__name__}, got none"
                    )
                pairs.append((getattr(module, replacement.__name__), replacement))
        self._package, self._pairs, self._modules = name, pairs, _modules(name)
        try:
            for place in _places(self._modules, pairs):
                place.namespace[place.key] = place.replacement
                self._places.append(place)
        except BaseException:  # a registry may refuse: then nothing is replaced
            self.undo()
            raise

    def undo(self) -> None:
        if not self._package:
            raise RuntimeError("unpatch: expected a patched package, got none")
        for place in self._places:
            if place.namespace.get(place.key) is place.replacement:
                place.namespace[place.key] = place.original
        # By place above and not by value, as a module may have had a replacement before.
        later = [module for module in _modules(self._package) if module not in self._modules]
        for place in _places(later, [(new, old) for old, new in self._pairs]):
            place.namespace[place.key] = place.replacement
        self._package, self._pairs, self._modules, self._places = "", [], [], []


def _modules(package: str) -> list[ModuleType]:
    return [
        module
        for name, module in list(sys.modules.items())
        if name == package or name.startswith(f"{package}.")
    ]


def _places(modules: list[ModuleType], pairs: list[tuple[Any, Any]]) -> list[_Place]:
    """Where these modules and their dicts hold the first of a pair, for its second."""
    by_identity = {id(old): new for old, new in pairs}
    places = []
    for module in modules:
        values = vars(module)
        registries = [value for value in values.values() if isinstance(value, dict)]
        for namespace in (values, *registries):
            for key, value in list(namespace.items()):
                if id(value) in by_identity:
                    places.append(_Place(namespace, key, value, by_identity[id(value)]))
    return places
