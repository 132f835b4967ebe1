# SPDX-License-Identifier: Apache-2.0
"""A block of Ray's actors: the types of its columns, and rows that fail."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("ray.data", reason="an extra is not installed")

import pyarrow as pa
from _ray_setups import block, low_rank, setup
from hullkit.interop.ray import AdaptRows


def test_kept_columns_have_the_types_of_the_dataset() -> None:
    """Of a table, whatever a block holds; of NumPy's arrays, what they hold."""
    types = {"n": pa.uint64(), "source": pa.string(), "day": pa.timestamp("ns")}
    types |= {"v": pa.list_(pa.float32())}
    values = {"n": [1, 99], "source": [None, None], "day": [None, 5], "v": [[0.5, 1.0], [2.0]]}
    table = pa.table({name: pa.array(values[name], of) for name, of in types.items()})
    rows = AdaptRows(setup, keep=[*types])(table)
    assert {name: rows.schema.field(name).type for name in types} == types
    assert [row["error"] is None for row in rows.to_pylist()] == [True, False]
    arrays = {"n": np.array([3, 1 << 63], np.uint64), "v": np.ones((2, 3), np.float32)}
    rows = AdaptRows(setup, keep=["n", "v"])(arrays)
    assert rows.schema.types[:2] == [pa.uint64(), pa.list_(pa.float32())]
    whole = {"n": np.array([1, 2]), "m": np.ones((2, 3, 4)), "h": np.array([5, 6], "datetime64[h]")}
    rows = AdaptRows(setup, keep=["m", "n"])(whole)
    assert rows.column("m").to_pylist() == np.ones((2, 3, 4)).tolist()
    assert AdaptRows(setup, keep=["h"])(whole).column("h")[0].as_py().hour == 5
    mixed = {"n": np.array([1, 2]), "source": np.array(["a", 5], object)}
    with pytest.raises(
        TypeError, match="keep: expected values of pyarrow's types in the column 'source'"
    ):
        AdaptRows(setup, keep=["source"])(mixed)


def test_declared_columns_are_in_every_block() -> None:
    def own(adapted: torch.nn.Module, row: Any) -> dict[str, Any]:
        return {"score": 1, "other": 2} if row["n"] == 5 else {"score": 1}

    made = setup()._replace(use=own, columns={"score": pa.float64()})
    actor = AdaptRows(lambda: made, keep=["n"])
    failed, good = actor(block(99)), actor(block(1, 5))
    assert failed.schema == good.schema
    assert good.column("score").to_pylist() == [1.0, None]
    assert "use: expected columns of ['score'], got 'other'" in good.column("error")[1].as_py()
    for of, value in ((pa.float32(), 1.5), (pa.int32(), np.int64(3)), (pa.large_string(), "x")):
        own = made._replace(use=lambda *_, v=value: {"s": v}, columns={"s": of})
        rows = AdaptRows(lambda own=own: own, keep=["n"])(block(1))
        assert rows.schema.field("s").type == of
        assert rows.column("s").to_pylist() == [value]
        own = made._replace(use=lambda *_: {"s": b"\xff"}, columns={"s": pa.int8()})
        [row] = AdaptRows(lambda own=own: own, keep=["n"])(block(1)).to_pylist()
        assert "use: expected int8 in the column 's', got" in row["error"]
    for columns, words in (
        ({"n": pa.int64()}, "columns: expected names of new columns, got 'n'"),
        ({"error": pa.string()}, "columns: expected names of new columns, got 'error'"),
        ({"s": "float"}, r"columns\['s'\]: expected a pyarrow.DataType, got str"),
    ):
        own = made._replace(columns=columns)  # type: ignore[arg-type]
        with pytest.raises((TypeError, ValueError), match=words):
            AdaptRows(lambda own=own: own, keep=["n"])


def test_whole_numbers_among_fractions() -> None:
    """Also those that Arrow takes for no fraction."""
    large = 2**53 + 1
    made = setup()._replace(use=lambda _, row: {"score": 0.5 if row["n"] == 1 else large})
    rows = AdaptRows(lambda: made, keep=["n"])(block(1, 5))
    assert rows.column("error").to_pylist() == [None, None]
    assert rows.column("score").to_pylist() == [0.5, float(large)]


def test_columns_are_in_the_order_of_use() -> None:
    """Hashes of strings differ between processes; the actors' tables must not."""
    names = [f"column {n}" for n in range(12)]
    made = setup()._replace(use=lambda *_: dict.fromkeys(names, 1.0))
    rows = AdaptRows(lambda: made, keep=["n"])(block(1, 2))
    assert rows.column_names[: 1 + len(names)] == ["n", *names]


def test_updates_are_counted_whatever_the_counts_type() -> None:
    def choose(given: Any) -> Any:
        counts = np.array([200, 100], np.uint8)
        return [([torch.tensor([1, 2])] * 2, counts) for _ in given["n"]]

    for made in (low_rank(), setup()):
        own = made._replace(choose=choose)
        rows = AdaptRows(lambda own=own: own, keep=["n"])(block(1))
        assert rows.column("error").to_pylist() == [None]
        assert rows.column("num_updates").to_pylist() == [300]


def test_a_row_for_which_the_model_raises_is_alone() -> None:
    class Picky(torch.nn.Sequential):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            if (ids == 7).any():
                raise ValueError("model: seven")
            out: torch.Tensor = super().forward(ids)
            return out

    for made in (low_rank, setup):
        own = made()
        own.tuner.model.__class__ = Picky
        rows = AdaptRows(lambda own=own: own, keep=["n"])(block(1, 7, 20)).to_pylist()
        assert [row["error"] for row in rows] == [None, "ValueError: model: seven", None]
