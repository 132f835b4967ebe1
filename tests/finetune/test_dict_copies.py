# SPDX-License-Identifier: Apache-2.0
"""Copies of dicts in the compiled core: which dicts have changed, and what they held."""

from __future__ import annotations

import gc
import weakref
from collections import defaultdict
from typing import Any

import pytest
from hullkit.native.kernels import DictCopies


class Thing:
    """Equal to all others of its kind, and yet another."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Thing)

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    "change",
    [
        lambda own: own.update(a=Thing()),
        lambda own: own.update(c=3),
        lambda own: own.pop("b"),
        lambda own: own.clear(),
        lambda own: own.update(a=own.pop("a")),  # another order
        lambda own: own.update(c=own.pop("b")),
    ],
    ids=["value", "more", "less", "none", "order", "name"],
)
@pytest.mark.parametrize("kind", [dict, lambda items: defaultdict(list, items)])
def test_what_has_changed(change: Any, kind: Any) -> None:
    first, changed, last = ({"a": Thing(), "b": 2} for _ in range(3))
    changed = kind(changed)
    held = dict(changed)
    copies = DictCopies([first, {}, changed, last])
    assert copies.changed() == []
    change(changed)
    [(found, copy)] = copies.changed()
    assert found is changed
    assert type(copy) is dict
    assert list(copy) == ["a", "b"]
    assert copy["a"] is held["a"]


def test_values_but_for_types_and_keys() -> None:
    thing, numbers = Thing(), [1, 2]
    copies = DictCopies([{"a": 1, "b": thing}, {"a": numbers, "skipped": [3], 5: True}])
    found = copies.values({int}, frozenset({"skipped"}))
    assert found == [thing, numbers, True]
    assert found[0] is thing
    assert found[1] is numbers


def test_what_is_held_lives_as_long_as_the_copies() -> None:
    class Own:
        pass

    own = Own()
    gone = weakref.ref(own)
    at: dict[str, Any] = {"own": own}
    copies = DictCopies([at])
    at.clear()
    del own
    assert gone() is not None
    assert copies.changed()[0][1]["own"] is gone()
    del copies
    gc.collect()
    assert gone() is None


def test_cycles_are_collected() -> None:
    """Copies that are held by what they hold."""

    class Own:
        pass

    own: Any = Own()
    gone = weakref.ref(own)
    own.copies = DictCopies([{}, own.__dict__, {"own": own}])
    del own
    gc.collect()
    assert gone() is None


def test_the_collector_may_come_at_any_moment() -> None:
    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(300):
            assert DictCopies([{"a": []}]).changed() == []
    finally:
        gc.set_threshold(*before)
    with pytest.raises(TypeError, match="not an acceptable base type"):
        type("Own", (DictCopies,), {})


@pytest.mark.parametrize("bad", [[{}, []], [None], [("a", "b")]])
def test_only_dicts(bad: list[Any]) -> None:
    with pytest.raises(TypeError, match="expected a list of dicts"):
        DictCopies(bad)


def test_types_and_keys_are_sets() -> None:
    with pytest.raises(TypeError, match="expected sets"):
        DictCopies([{"a": 1}]).values([int], set())  # type: ignore[arg-type]
